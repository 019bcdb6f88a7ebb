"""The default model: its name, and where the user's copy is kept."""

from __future__ import annotations

from pathlib import Path

from trivium.cache_folder import cache_folder

EMBEDDED_MODEL = "smollm2-135m-instruct"


def embedded_folder(device: str = "cpu") -> Path:
    """Where the embedded model for `cpu` or `cuda` is, or will be."""
    models = cache_folder() / "models"
    return (models / "cuda" if device == "cuda" else models) / EMBEDDED_MODEL
