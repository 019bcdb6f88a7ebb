"""What the services share, and the command line.

Every process imports this package first, so what a library reads from the environment when it is
loaded is said here.
"""

import os

# Since 1.29 ONNX Runtime looks up and calls a host of its maker from each process that loads it,
# and keeps a device id in the user's cache folder. An owner who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
