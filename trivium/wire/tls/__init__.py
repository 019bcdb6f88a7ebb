"""TLS of servers and of channels, from PEM files that may be replaced while they are in use."""
