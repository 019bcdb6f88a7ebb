"""Between JSON objects and the public protobuf; the one door for generated protobuf code.

Knows nothing of HTTP, SSE or gRPC calls.
"""
