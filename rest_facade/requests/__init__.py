"""The bodies that clients send: types, limits and rules, checked strictly. Knows no protobuf."""
