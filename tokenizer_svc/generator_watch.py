"""Whether the generator behind a model is there and serves the same revision of it.

Knows nothing of gRPC: `Informant` says what it needs to be told.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol

from tokenizer_svc.generation import GeneratorInfo
from trivium.wire.errors import ServiceError

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
RESUME_SECONDS = 0.05


class Informant(Protocol):
    """What a generator is asked; both raise ServiceError when it cannot be reached."""

    def health(self) -> AsyncGenerator[bool]:
        """Whether it serves: at once, then at every change, until the connection is lost."""

    async def info(self) -> GeneratorInfo:
        """What it serves."""


class GeneratorWatch:
    """Follows one generator; `available` while it can be asked for answers."""

    def __init__(self, revision: str, client: Informant) -> None:
        self._revision = revision
        self._client = client
        self._info: GeneratorInfo | None = None
        self.available = False

    @property
    def context_length(self) -> int | None:
        """The generator's own limit on prompt and answer together; None before it was asked."""
        return None if self._info is None else self._info.context_length

    def check_revision(self) -> None:
        """Raises ServiceError revision_mismatch if the generator is known to serve another."""
        if self._info is not None and self._info.revision != self._revision:
            message = (
                f"The tokenizer serves revision {self._revision} of the model, "
                f"the generator {self._info.revision}."
            )
            raise ServiceError("revision_mismatch", message)

    async def run(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        """Follows the generator for good; `on_change` hears of every change of `available`."""
        while True:
            heard = False
            try:
                async with aclosing(self._client.health()) as states:
                    async for serving in states:
                        await self._set(await self._is_right(serving), on_change)
                        heard = True
            except ServiceError as error:
                log.debug("the generator cannot be followed: %s", error.message)
            # A connection that ends of old age is followed by a new one without a gap.
            if not heard:
                await self._set(False, on_change)
            await asyncio.sleep(RESUME_SECONDS if heard else RETRY_SECONDS)

    async def _is_right(self, serving: bool) -> bool:
        if not serving:
            return False
        self._info = await self._client.info()
        try:
            self.check_revision()
        except ServiceError as error:
            log.error("%s", error.message)
            return False
        return True

    async def _set(self, available: bool, on_change: Callable[[bool], Awaitable[None]]) -> None:
        if available != self.available:
            log.info("the generator is %s", "available" if available else "not available")
            self.available = available
            await on_change(available)
