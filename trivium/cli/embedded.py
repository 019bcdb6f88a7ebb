"""The model that is there when none is named, and the folder that keeps it.

`python -m trivium.cli.embedded` exits with 0 when it is there: the Makefile asks.
"""

import os
import sys
from pathlib import Path

from trivium.model_directory import ModelDirectory, ModelDirectoryError, load_model_directory

EMBEDDED_MODEL = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """`$TRIVIUM_CACHE`, or `trivium` in the user's cache folder (`$XDG_CACHE_HOME`, ~/.cache)."""
    own = os.environ.get("TRIVIUM_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache").absolute() / "trivium"


def embedded_folder() -> Path:
    """Where the embedded model is, or will be."""
    return cache_folder() / "models" / EMBEDDED_MODEL


def find_embedded() -> ModelDirectory | None:
    """The embedded model if it is there and whole."""
    try:
        return load_model_directory(embedded_folder())
    except ModelDirectoryError:
        return None


if __name__ == "__main__":
    sys.exit(find_embedded() is None)
