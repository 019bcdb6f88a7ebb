"""Token ids in, token ids out: the stage that owns the model and its device."""

import os

import trivium  # noqa: F401 - before ONNX Runtime is loaded, which it tells to keep quiet

# NumPy's linear algebra would start a thread for each processor it sees, and is not used here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
