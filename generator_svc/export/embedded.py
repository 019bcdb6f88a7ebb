"""`python -m generator_svc.export.embedded`: makes the embedded model, unless it is there.

`trivium up` runs it before it starts the services. With `--check` nothing is made, and the exit
status is 1 when it would be: the Makefile asks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from generator_svc.export import EXPORTER_VERSION, embedded_precision
from trivium.embedded_model import EMBEDDED_MODEL, embedded_folder
from trivium.model_directory import (
    MANIFEST,
    ModelDirectory,
    ModelDirectoryError,
    load_model_directory,
)


def find_embedded() -> ModelDirectory | None:
    """The embedded model if it is there, whole, as this version makes it, and runs here.

    A cache that several machines share may have it in a precision that this processor lacks.
    """
    folder = embedded_folder()
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
    check = parser.parse_args().check
    if find_embedded() is not None:
        sys.exit(0)
    if check:
        sys.exit(1)
    folder = embedded_folder()
    print(f"Exporting {EMBEDDED_MODEL} to {folder}, once.", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "generator_svc.export", EMBEDDED_MODEL, "--out", str(folder)]
    command += ["--precision", embedded_precision()]
    if folder.exists():  # damaged, from another version, or for another processor
        command.append("--force")
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
