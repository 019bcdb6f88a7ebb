"""Code shared by the services, and the command line.

Every process imports this package first, so environment variables that libraries read when they
are loaded are set here.
"""

import os

# Since 1.29 ONNX Runtime contacts its vendor's telemetry host from each process that loads it, and
# keeps a device id in the user's cache folder. Set the variable to 0 to allow that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
