"""The models that `trivium up` is asked for: their folders, made first where they have to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from trivium.cache_folder import cache_folder
from trivium.cli.supervisor import LEASH
from trivium.embedded_model import EMBEDDED_MODEL
from trivium.hub_name import HubName
from trivium.model_directory import ModelDirectoryError, load_model_directory


class NoModel(Exception):
    """A model cannot be served; the text says why."""


class ExportFailed(Exception):
    """It said why itself, on stderr; `status` is its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class NamedModel(NamedTuple):
    """A model's folder, and a name besides the folder's by which requests may ask for it."""

    folder: Path
    alias: str | None = None


def find_model(name: str, device: str) -> NamedModel:
    """The model called `name`: a path or an id, or a checkpoint's path or name on the hub.

    The embedded model and checkpoints are exported to the cache first if they are not there, for
    `device` (auto, cpu or cuda). Raises NoModel, ExportFailed.
    """
    if name == EMBEDDED_MODEL:
        return NamedModel(_cached(name, device))
    candidates = possible_folders(name)
    for folder in candidates:
        if folder.is_dir() and not _is_checkpoint(folder):
            try:
                return NamedModel(load_model_directory(folder).path)
            except ModelDirectoryError as error:
                raise NoModel(str(error)) from error
    path = candidates[0]
    if path.exists():
        return NamedModel(_cached(str(path.absolute()), device))
    if HubName.parse(name) is not None:
        return NamedModel(_cached(name, device), alias=name)
    looked = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in candidates))
    raise NoModel(
        f"{name!r} is no model folder, no checkpoint (a folder, a .gguf file) and no name on the "
        f"hub (owner/name); looked for {looked}"
    )


def possible_folders(name: str) -> list[Path]:
    """Where a model folder called `name` may be, first the path itself."""
    return [Path(name).expanduser(), Path("models") / name, cache_folder() / "models" / name]


def _is_checkpoint(folder: Path) -> bool:
    """Whether it holds weights as they are published."""
    return any(file.suffix in (".safetensors", ".gguf") for file in folder.iterdir())


def _cached(source: str, device: str) -> Path:
    """Its export in the cache, made by a process of its own if it is not there."""
    leash = (sys.executable, "-I", LEASH, str(os.getpid()))
    command = (sys.executable, "-m", "generator_svc.export.cached", source, "--device", device)
    done = subprocess.run([*leash, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ExportFailed(done.returncode)
    return Path(done.stdout.splitlines()[0])
