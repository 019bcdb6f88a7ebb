"""The shared libraries of ONNX Runtime's CUDA provider: the missing ones, and their packages."""

from __future__ import annotations

import ctypes
import sys

INSTALL = "pip install 'trivium[cuda]'"

# The libraries that the provider of the version in pyproject.toml is linked against, with the
# package that provides each; the machine provides the driver.
_DRIVER = "libcuda.so.1"
LIBRARIES = {
    _DRIVER: "the NVIDIA driver",
    "libcudart.so.13": "nvidia-cuda-runtime",
    "libcublas.so.13": "nvidia-cublas",
    "libcublasLt.so.13": "nvidia-cublas",
    "libcurand.so.10": "nvidia-curand",
    "libcudnn.so.9": "nvidia-cudnn-cu13",
}


def missing_libraries() -> str:
    """The libraries that cannot be loaded and their packages, as text; empty if none is missing.

    Call it after ONNX Runtime's preload_dlls, which loads what pip has installed. Only the names on
    Linux are known: elsewhere, creating a session is the only test.
    """
    if sys.platform != "linux":
        return ""
    missing = [name for name in LIBRARIES if not _loads(name)]
    parts = [", ".join(f"{name} ({LIBRARIES[name]})" for name in missing)] if missing else []
    if missing and missing != [_DRIVER]:
        parts.append(f"{INSTALL} installs all of them except the driver's")
    return "; ".join(parts)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
