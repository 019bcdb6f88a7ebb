"""Where a process listens: hosts as written in settings, addresses, and ports in use."""

import errno
import socket
from typing import Annotated

from pydantic import AfterValidator

from trivium.wire.settings import refuse_to_start


def bare_host(host: str) -> str:
    """The host without the brackets of an IPv6 address, as sockets take it."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


Host = Annotated[str, AfterValidator(bare_host)]


def address_of(host: str, port: int) -> str:
    """host:port, and [host]:port for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A socket bound as a server would bind it; port 0 picks a free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def free_ports(count: int) -> list[int]:
    """Distinct ports of the loopback interface that were free a moment ago."""
    listeners = [bind("127.0.0.1", 0) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def bind_error_message(host: str, port: int, error: OSError) -> str:
    """Why nothing can listen there, with the address."""
    is_taken = error.errno == errno.EADDRINUSE
    reason = "is in use" if is_taken else f"cannot be bound: {error.strerror or error}"
    return f"{address_of(host, port)} {reason}"


def refuse_taken_ports(prefix: str, host: str, port: int, metrics_port: int) -> None:
    """Refuses to start on ports in use, which gRPC would report less clearly, and only after the
    model is loaded. `prefix` is that of the settings' names."""
    for setting, number in (("PORT", port), ("METRICS_PORT", metrics_port)):
        try:
            bind(host, number).close()
        except OSError as error:
            refuse_to_start(f"{prefix}{setting}: {bind_error_message(host, number, error)}")
    if port == metrics_port != 0:
        address = address_of(host, port)
        refuse_to_start(f"{prefix}METRICS_PORT: {address} is in use by {prefix}PORT")
