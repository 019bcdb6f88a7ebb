"""Watches whether a generator is available for a model, and if not, why."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol

from tokenizer_svc.generator.types import GeneratorInfo
from trivium.wire.errors import ServiceError
from trivium.wire.replicas.replica_set import GAP_SECONDS

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
_MAX_LAG_SECONDS = 0.25

# The errors while a generator that was started together with the tokenizer loads its model.
_LOADING = ("backend_unavailable", "model_loading")


class GeneratorInfoSource(Protocol):
    """The source of the state of one revision's generators."""

    def serving(self) -> AsyncGenerator[bool]:
        """Yields whether any generator is serving: now, then at every change, forever."""

    async def info(self) -> GeneratorInfo:
        """What the generators serve; raises ServiceError."""

    async def fault(self) -> ServiceError:
        """Why no generator is serving."""


class GeneratorWatch:
    """Watches the generators of one model.

    `available` while any of them is serving; `fault` is why none is, once that is known.
    """

    def __init__(self, client: GeneratorInfoSource) -> None:
        self._client = client
        self._serving = asyncio.Event()
        self._gone = asyncio.Event()
        self._info: GeneratorInfo | None = None
        self.available = False
        self.fault: ServiceError | None = None

    @property
    def context_length(self) -> int | None:
        """The generator's own limit on prompt and answer together; None until known."""
        return None if self._info is None else self._info.context_length

    def check_available(self) -> None:
        """Raises ServiceError if it is known that no generator is serving."""
        if self.fault is not None:
            raise ServiceError(self.fault.code, self.fault.message, everywhere=True)

    async def run(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        """Watches the generators forever; calls `on_change` at every change of `available`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._update(on_change))

    async def _listen(self) -> None:
        async with aclosing(self._client.serving()) as states:
            async for serving in states:
                now, before = self._serving, self._gone
                if not serving:
                    now, before = before, now
                before.clear()
                now.set()

    async def _update(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        failing_since = math.inf
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(GAP_SECONDS):
                    await self._serving.wait()
            except TimeoutError:
                if time.monotonic() - began > GAP_SECONDS + _MAX_LAG_SECONDS:
                    continue  # the event loop was blocked, so updates may be waiting
                failing_since = math.inf
                await self._set(await self._client.fault(), on_change)
                continue
            try:
                self._info = await self._client.info()
            except ServiceError as error:
                log.debug("cannot get the generator's model info: %s", error.message)
                failing_since = min(failing_since, time.monotonic())
                if time.monotonic() - failing_since > GAP_SECONDS:
                    await self._set(error, on_change)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            failing_since = math.inf
            await self._set(None, on_change)
            await self._gone.wait()

    async def _set(
        self, fault: ServiceError | None, on_change: Callable[[bool], Awaitable[None]]
    ) -> None:
        known, self.fault = self.fault, fault
        if fault is not None and (known is None or known.message != fault.message):
            if self._info is None and fault.code in _LOADING:
                log.info("waiting for a generator: %s", fault.message)
            else:
                log.error("no generator is available: %s", fault.message)
        if self.available is not (fault is None):
            self.available = fault is None
            log.info("the generator is %s", "available" if self.available else "not available")
            await on_change(self.available)
