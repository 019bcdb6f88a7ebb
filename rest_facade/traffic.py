"""What is going on in this process: how many API requests run, and whether more may come."""

import asyncio
import contextlib
from collections.abc import Iterator

from trivium.wire.errors import ServiceError


class Traffic:
    """Counts running API requests; once draining, refuses new ones."""

    def __init__(self) -> None:
        self.draining = False
        self.running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check_open(self) -> None:
        """Raises ServiceError when this process is about to end."""
        if self.draining:
            raise ServiceError("draining", "The server is shutting down.")

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request for as long as it runs; raises ServiceError when draining."""
        self.check_open()
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self._idle.set()

    async def until_idle(self) -> None:
        """Returns when no request runs."""
        await self._idle.wait()
