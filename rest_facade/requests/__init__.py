"""Request bodies: strict types, ranges and rules. Knows nothing about protobuf."""
