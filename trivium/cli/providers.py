"""Which ONNX Runtime providers really work here, tested by a graph of one addition.

If CUDA is requested but cannot work, ONNX Runtime only warns and falls back to the CPU, so the
session is asked which provider it uses. Besides this module, only `generator_svc/device.py` and the
exporter import the runtime.
"""

from __future__ import annotations

import contextlib
import functools
import io

import numpy as np
import onnxruntime as ort

from trivium.cuda_libraries import missing_libraries

# y = x + x, one float: a serialised ONNX model of IR version 8 and opset 17.
GRAPH = (
    b"\x08\x08\x12\x00:5\n\x0e\n\x01x\n\x01x\x12\x01y\x22\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08"
    b"\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n"
    b"\x00\x10\x11"
)
SILENT = 4  # the runtime's log level that shows fatal errors only
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def version() -> str:
    """The runtime's version."""
    return str(ort.__version__)


@functools.cache  # a session on CUDA takes seconds
def why_not(provider: str) -> str | None:
    """None if `provider` runs the graph, otherwise why it does not."""
    if provider not in ort.get_available_providers():
        return "not in this build of ONNX Runtime"
    ort.set_default_logger_severity(SILENT)
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    try:
        if provider == CUDA:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints failures
                ort.preload_dlls()  # finds the libraries of the cuda extra
        session = ort.InferenceSession(GRAPH, options, providers=[provider])
        if provider not in session.get_providers():
            return missing_libraries() or "no CUDA device found"
        (result,) = session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # the runtime's exceptions have no other common base class
        return str(error).splitlines()[0]
    return None if result[0] == 2 else f"computes 1 + 1 = {result[0]}"
