"""The model that is there when none is named, and the folder that keeps it.

`python -m trivium.cli.embedded` exits with 0 when it is there: the Makefile asks.
"""

import json
import sys
from pathlib import Path

from generator_svc.export import EXPORTER_VERSION, embedded_precision
from trivium.cache_folder import cache_folder
from trivium.model_directory import (
    MANIFEST,
    ModelDirectory,
    ModelDirectoryError,
    load_model_directory,
)

EMBEDDED_MODEL = "smollm2-135m-instruct"


def embedded_folder() -> Path:
    """Where the embedded model is, or will be."""
    return cache_folder() / "models" / EMBEDDED_MODEL


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


if __name__ == "__main__":
    sys.exit(find_embedded() is None)
