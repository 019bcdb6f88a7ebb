"""Between the public protocol's protobuf and plain values."""
