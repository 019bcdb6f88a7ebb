"""Between the public protobuf and JSON; the one door for generated protobuf code.

Knows nothing of HTTP, SSE or gRPC calls.
"""
