"""Where a process listens: its host as the settings have it, and host and port as one address."""

from typing import Annotated

from pydantic import AfterValidator


def bare_host(host: str) -> str:
    """An IPv6 address may be written with brackets; sockets take it without."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


Host = Annotated[str, AfterValidator(bare_host)]


def address_of(host: str, port: int) -> str:
    """host:port, and [host]:port for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
