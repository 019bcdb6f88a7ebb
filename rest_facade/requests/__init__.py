"""Request bodies: strict types, ranges and rules. Knows nothing of protobuf."""
