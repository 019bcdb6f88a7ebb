"""The packages that model export needs beyond the serving environment."""

from __future__ import annotations

import importlib.util

PACKAGES = ("torch", "transformers", "optimum", "onnx", "gguf")


def missing_packages() -> list[str]:
    """The packages of the export extra that are not installed. Imports none of them."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]
