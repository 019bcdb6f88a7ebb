"""The parts of this stage put together: model, watch on the generator, gRPC server.

Knows nothing of signals or of the environment.
"""

import asyncio
from contextlib import AsyncExitStack, suppress

from tokenizer_svc.config import TokenizerSettings
from tokenizer_svc.generator_client import GeneratorClient
from tokenizer_svc.generator_watch import GeneratorWatch
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import Model
from tokenizer_svc.service import (
    PIPELINE_SERVICES,
    TOKENIZER_SERVICE,
    ServedModel,
    create_server,
)
from trivium.wire.channel import open_channel


class TokenizerServer:
    """Serves one model until `drain`. `port` is the one that gRPC really has."""

    def __init__(self, settings: TokenizerSettings, model: Model, metrics: Metrics) -> None:
        self.port = 0
        self._settings = settings
        self._channel = open_channel(settings.generator_target)
        connection = GeneratorClient(self._channel)
        self._watch = GeneratorWatch(model.revision, connection)
        models = {model.id: ServedModel(model, connection, self._watch)}
        self._server = create_server(models, metrics)
        self._background = AsyncExitStack()

    async def start(self) -> None:
        """Alive at once; ready for completions when the generator is."""
        self.port = await self._server.start(f"{self._settings.host}:{self._settings.port}")
        await self._server.set_serving(True, ["", TOKENIZER_SERVICE])
        following = asyncio.create_task(self._watch.run(self._set_ready))
        self._background.push_async_callback(self._channel.close)
        self._background.push_async_callback(_end, following)

    async def drain(self) -> None:
        """Not ready, then no new calls, then the running ones get their time."""
        await self._server.drain(self._settings.drain_notice_seconds, self._settings.drain_seconds)
        await self._background.aclose()

    async def _set_ready(self, ready: bool) -> None:
        await self._server.set_serving(ready, PIPELINE_SERVICES)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
