"""Requests in flight in a process, and the gate that closes when it drains."""

import asyncio
import contextlib
import enum
from collections.abc import Iterator

from trivium.wire.errors import ServiceError


class DrainState(enum.Enum):
    """How far a process is in its shutdown."""

    NONE = "none"
    NOTICE = "notice"
    DRAIN = "drain"


class InFlight:
    """Counts requests, or calls, from admission to end.

    A process shuts down in two steps. First `leaving` is set: it reports not ready, but serves as
    before. Then `draining`: new requests are refused. `idle` is set while none is in flight.
    """

    def __init__(self) -> None:
        self.count = 0
        self.leaving = False
        self.draining = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def state(self) -> DrainState:
        """How far the drain is; may be read from any thread."""
        if self.draining.is_set():
            return DrainState.DRAIN
        return DrainState.NOTICE if self.leaving else DrainState.NONE

    def check_ready(self) -> None:
        """Raises ServiceError if this process is shutting down and requests should go elsewhere."""
        if self.leaving:
            raise _draining()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts one request while the block runs; raises ServiceError when draining."""
        if self.draining.is_set():
            raise _draining()
        self.count += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if self.count == 0:
                self.idle.set()


def _draining() -> ServiceError:
    return ServiceError("draining", "The server is shutting down.")


async def wait_for_any(seconds: float, *events: asyncio.Event) -> None:
    """Returns when one of `events` is set, or after `seconds`."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
