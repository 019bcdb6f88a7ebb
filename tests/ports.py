"""Ports for servers that a test starts."""

import itertools
import os
import random
import socket

# Below the range from which Linux gives ports to clients, and to whoever asks for port 0: another
# test might be given one of those before the server that it was meant for has started. Each worker
# has a share of its own.
_FIRST, _LAST = 10_000, 32_000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_SHARE = range(_FIRST + _WORKER, _LAST, _WORKERS)
# From anywhere, for the sake of another pytest that runs at the same time.
_ports = itertools.islice(itertools.cycle(_SHARE), random.randrange(len(_SHARE)), None)


def free_port() -> int:
    """A port at which nobody listens and which no other test will be given."""
    for port in _ports:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError


def free_ports(count: int) -> list[int]:
    """Several of them."""
    return [free_port() for _ in range(count)]


def up_ports() -> list[str]:
    """Options of `trivium up` that give it free ports, as one may be running on the usual ones.

    They leave room for the generators of three models, whose ports follow on each other.
    """
    services = ("tokenizer", "generator")
    names = ["port", *(f"{one}-{kind}" for one in services for kind in ("port", "metrics-port"))]
    ports = free_ports(3 * len(names))[::3]
    return [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
