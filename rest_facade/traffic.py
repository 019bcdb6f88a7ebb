"""In-flight request counter and drain gate."""

import asyncio
import contextlib
from collections.abc import Iterator

from trivium.wire.errors import ServiceError


class Traffic:
    """Counts API requests in flight.

    First `leaving`: not ready any more, though requests are served, on connections that close
    after them. Then `draining` too: new ones are refused. `idle` is set while none runs.
    """

    def __init__(self) -> None:
        self.leaving = False
        self.draining = False
        self.running = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def check_ready(self) -> None:
        """Raises ServiceError when requests should go elsewhere, as this process is to end."""
        if self.leaving:
            raise _draining()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request for as long as it runs; raises ServiceError when draining."""
        if self.draining:
            raise _draining()
        self.running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self.idle.set()


def _draining() -> ServiceError:
    return ServiceError("draining", "The server is shutting down.")
