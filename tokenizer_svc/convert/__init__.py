"""Converts between the public protocol's protobuf and plain values."""
