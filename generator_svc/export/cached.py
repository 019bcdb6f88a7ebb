"""`python -m generator_svc.export.cached SOURCE`: exports a model into the cache if it is missing.

`trivium up` runs it before it starts the services, for the embedded model and for checkpoints, and
reads the model's folder from standard output. With `--check` nothing is exported, and the exit
status is 1 if it would be; the Makefile uses that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

from generator_svc.device import DeviceError, choose_device
from generator_svc.export import (
    EXPORTER_VERSION,
    ExportError,
    ExportOptions,
    embedded_precision,
    is_current,
)
from trivium.cache_folder import cache_folder
from trivium.embedded_model import EMBEDDED_MODEL, embedded_folder
from trivium.hub_name import HubName
from trivium.model_directory import (
    MANIFEST,
    ModelDirectory,
    ModelDirectoryError,
    load_model_directory,
)
from trivium.wire.settings import refuse_to_start


def find_embedded(device: str) -> ModelDirectory | None:
    """The embedded model for `cpu` or `cuda` if it is complete, made by this exporter version, and
    runs here.

    In a cache shared by several machines, its precision may be one that this processor lacks.
    """
    folder = embedded_folder(device)
    try:
        model = load_model_directory(folder)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ModelDirectoryError, OSError, ValueError):
        return None
    current = manifest.get("exporter_version") == EXPORTER_VERSION
    runs = manifest.get("precision") != "w8a8" or embedded_precision() == "w8a8"
    return model if current and runs else None


def cached_folder(source: str, device: str) -> Path:
    """The folder for the export of `source` for `cpu` or `cuda`; its name is the model's id.

    The path of a local checkpoint has to be absolute.
    """
    if source == EMBEDDED_MODEL:
        return embedded_folder(device)
    name = HubName.parse(source)
    path = Path(source if name is None else name.repo)
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    identifier = path.stem if path.suffix == ".gguf" else path.name
    return cache_folder() / "exports" / device / digest / identifier


def main() -> None:
    """Exits with 0 if the model is there; otherwise replaces this process by its export."""
    parser = argparse.ArgumentParser(
        prog="python -m generator_svc.export.cached",
        description="Exports a model to the cache unless it is already there.",
    )
    parser.add_argument("source", nargs="?", default=EMBEDDED_MODEL)
    parser.add_argument(
        "--check", action="store_true", help="export nothing; exit with 1 if an export is needed"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    try:
        device = choose_device(given.device)
    except DeviceError as error:
        refuse_to_start(f"trivium: {error}")
    source = given.source
    is_embedded = source == EMBEDDED_MODEL
    on_cpu = embedded_precision() if is_embedded else "int8"
    options = ExportOptions("fp16" if device == "cuda" else on_cpu, device)
    folder = cached_folder(source, device)
    print(folder, flush=True)
    try:
        found = find_embedded(device) if is_embedded else is_current(folder, source, options)
    except ExportError as error:
        refuse_to_start(f"trivium: {error}")
    if found:
        sys.exit(0)
    if given.check:
        sys.exit(1)
    print(f"Exporting {source} to {folder} (once).", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "generator_svc.export", source, "--out", str(folder)]
    command += ["--device", device, "--precision", options.precision]
    if folder.exists():  # damaged, from another version, or for another processor
        command.append("--force")
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
