"""The generator stage: token ids in, token ids out; owns the model and its device."""

import os

import trivium  # noqa: F401 - sets ONNX Runtime's log level, which has to precede its import

# NumPy's linear algebra is unused here, but would start a thread per core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
