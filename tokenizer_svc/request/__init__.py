"""Requests as plain values, and their validation."""
