"""Converts between JSON objects and the public protobuf; alone imports generated protobuf code.

Knows nothing about HTTP, SSE or gRPC calls.
"""
