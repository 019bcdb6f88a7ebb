"""Finds the folders of the models that `trivium up` should serve, and exports them if needed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from trivium.cache_folder import cache_folder
from trivium.cli.supervisor import EXIT_WITH_PARENT
from trivium.embedded_model import EMBEDDED_MODEL
from trivium.hub_name import HubName
from trivium.model_directory import GENAI_CONFIG, ModelDirectoryError, load_model_directory


class NoModel(Exception):
    """A model cannot be served; the message says why."""


class ExportFailed(Exception):
    """The export failed, and said why on stderr; `status` is its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class NamedModel(NamedTuple):
    """A model's folder, and another name besides the folder's that requests may use."""

    folder: Path
    alias: str | None = None


def find_model(name: str, device: str) -> NamedModel:
    """The model called `name`: a model folder's path or id, or a checkpoint's path or hub name.

    The embedded model and checkpoints are first exported to the cache for `device` (auto, cpu or
    cuda), unless they are already there. Raises NoModel, ExportFailed.
    """
    if name == EMBEDDED_MODEL:
        return NamedModel(_cached(name, device))
    candidates = possible_folders(name)
    path = candidates[0]
    try:
        for folder in candidates:
            if folder.is_dir() and not _is_checkpoint(folder):
                return NamedModel(load_model_directory(folder).path)
        if path.exists():
            return NamedModel(_cached(str(path.absolute()), device))
    except (ModelDirectoryError, OSError) as error:  # OSError: it may not be read
        raise NoModel(str(error)) from error
    if HubName.parse(name) is not None:
        return NamedModel(_cached(name, device), alias=name)
    searched = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in candidates))
    raise NoModel(
        f"{name!r} is neither a model folder, a checkpoint (a folder, a .gguf file) nor a model "
        f"on the hub (owner/name); searched {searched}"
    )


def possible_folders(name: str) -> list[Path]:
    """Where a model folder called `name` may be, first the path itself."""
    folders = [Path(os.path.expanduser(name)), Path("models") / name]
    with contextlib.suppress(RuntimeError):  # in a container the user may be just a number
        folders.append(cache_folder() / "models" / name)
    return folders


def _is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds checkpoint weights, and no model that can be served as it is."""
    if (folder / GENAI_CONFIG).is_file():
        return False
    return any(file.suffix in (".safetensors", ".gguf") for file in folder.iterdir())


def _cached(source: str, device: str) -> Path:
    """The folder of its export in the cache, made by a separate process if missing."""
    try:
        cache_folder()
    except RuntimeError as error:
        raise NoModel(f"{source} would be exported to the cache, but {error}") from error
    wrapper = (sys.executable, "-I", EXIT_WITH_PARENT, str(os.getpid()))
    command = (sys.executable, "-m", "generator_svc.export.cached", source, "--device", device)
    done = subprocess.run([*wrapper, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ExportFailed(done.returncode)
    return Path(done.stdout.splitlines()[0])
