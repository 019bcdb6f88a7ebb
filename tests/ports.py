"""Ports for servers that tests start."""

import itertools
import os
import random
import socket

# Below Linux's range of ephemeral ports: one of those could be given to another test before the
# server that it was meant for has started. Each worker has its own share.
_FIRST, _LAST = 10_000, 32_000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_SHARE = range(_FIRST + _WORKER, _LAST, _WORKERS)
# Starts at random, as another pytest may run at the same time.
_ports = itertools.islice(itertools.cycle(_SHARE), random.randrange(len(_SHARE)), None)


def free_port() -> int:
    """A port without a listener, which no other test gets."""
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
    """Several free ports."""
    return [free_port() for _ in range(count)]


def up_ports() -> list[str]:
    """Options that give `trivium up` free ports, as another one may use the default ports.

    They leave room for the generators of three models, which use consecutive ports.
    """
    services = ("tokenizer", "generator")
    names = ["port", *(f"{one}-{kind}" for one in services for kind in ("port", "metrics-port"))]
    ports = free_ports(3 * len(names))[::3]
    return [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
