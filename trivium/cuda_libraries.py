"""The shared libraries of ONNX Runtime's CUDA provider: which are missing, and who has them."""

from __future__ import annotations

import ctypes
import sys

INSTALL = "pip install 'trivium[cuda]'"

# Those that the provider of the version in pyproject.toml is linked to, by the package that has
# them; the driver's is the machine's own.
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
    """What cannot be loaded and who has it, as a text; empty if nothing is missing.

    To be asked after ONNX Runtime's preload_dlls, which loads what pip has installed. Only Linux's
    names are known here: elsewhere a session has to be tried.
    """
    if sys.platform != "linux":
        return ""
    missing = [name for name in LIBRARIES if not _loads(name)]
    told = [", ".join(f"{name} ({LIBRARIES[name]})" for name in missing)] if missing else []
    if missing and missing != [_DRIVER]:
        told.append(f"{INSTALL} brings all but the driver's")
    return "; ".join(told)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
