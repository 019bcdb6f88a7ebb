"""`python -m generator_svc.export.embedded`: makes the embedded model, unless it is there.

`trivium up` runs it before it starts the services, and reads the model's folder from standard
output. With `--check` nothing is made, and the exit status is 1 when it would be, which the
Makefile asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from generator_svc.device import DeviceError, choose_device
from generator_svc.export import EXPORTER_VERSION, embedded_precision
from trivium.embedded_model import EMBEDDED_MODEL, embedded_folder
from trivium.model_directory import (
    MANIFEST,
    ModelDirectory,
    ModelDirectoryError,
    load_model_directory,
)
from trivium.wire.settings import refuse_to_start


def find_embedded(device: str) -> ModelDirectory | None:
    """The embedded model for `cpu` or `cuda` if it is there, whole, as this version makes it, and
    runs here.

    A cache that several machines share may have it in a precision that this processor lacks.
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


def main() -> None:
    """Exits with 0 when the model is there; otherwise becomes the export of it."""
    parser = argparse.ArgumentParser(
        prog="python -m generator_svc.export.embedded",
        description="Makes the embedded model in the cache, unless it is there.",
    )
    parser.add_argument("--check", action="store_true", help="make nothing: exit 1 if it is not")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    try:
        device = choose_device(options.device)
    except DeviceError as error:
        refuse_to_start(f"trivium: {error}")
    folder = embedded_folder(device)
    print(folder, flush=True)
    if find_embedded(device) is not None:
        sys.exit(0)
    if options.check:
        sys.exit(1)
    print(f"Exporting {EMBEDDED_MODEL} to {folder}, once.", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "generator_svc.export", EMBEDDED_MODEL, "--out", str(folder)]
    precision = "fp16" if device == "cuda" else embedded_precision()
    command += ["--device", device, "--precision", precision]
    if folder.exists():  # damaged, from another version, or for another processor
        command.append("--force")
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
