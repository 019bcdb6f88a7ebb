"""Requests as plain values, and all checks of them."""
