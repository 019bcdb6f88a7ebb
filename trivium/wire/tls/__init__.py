"""TLS for servers and channels, from PEM files that may be replaced while in use."""
