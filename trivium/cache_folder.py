"""The user's cache folder, for models and file digests."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TRIVIUM_CACHE`, or `trivium` in the user's cache folder (`$XDG_CACHE_HOME`, ~/.cache).

    It need not exist. Raises RuntimeError for a user without a home folder.
    """
    own, root = os.environ.get("TRIVIUM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        return (Path(root) if root else Path.home() / ".cache").absolute() / "trivium"
    except RuntimeError:
        raise RuntimeError("the home folder is unknown: set TRIVIUM_CACHE") from None
