"""A request as plain values, and every check of it."""
