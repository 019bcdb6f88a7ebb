"""The generator stage: token ids in, token ids out; owns the model and its device."""

import os

import trivium  # noqa: F401 - sets the log level of ONNX Runtime, so before that is loaded

# NumPy's linear algebra, unused here, would start a thread per processor.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
