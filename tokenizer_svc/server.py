"""Builds the service: models, watches of their generators, and the gRPC server."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress

from tokenizer_svc.config import ModelSettings, TokenizerSettings
from tokenizer_svc.generator.client import GeneratorClient
from tokenizer_svc.generator.watch import GeneratorWatch
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import Model, ServedModel, ServedModels, load_model
from tokenizer_svc.service import (
    COMPLETIONS,
    PIPELINE_SERVICES,
    TOKENIZER_SERVICE,
    create_server,
)
from trivium.keys.grpc_guard import KeyGuard
from trivium.keys.key_file import KeyFile
from trivium.keys.settings import open_limits, open_own_key
from trivium.model_directory import ModelDirectoryError
from trivium.wire.errors import ServiceError
from trivium.wire.in_flight import InFlight
from trivium.wire.listening import address_of
from trivium.wire.process_metrics import register_process
from trivium.wire.replicas.metrics import ReplicaCollector
from trivium.wire.tls.metrics import CertificateCollector


def load_models(settings: TokenizerSettings) -> list[Model]:
    """Loads the models of the settings, in order; raises ModelDirectoryError if one is not usable
    or shares a name with another."""
    models = [
        load_model(
            one.model_directory,
            one.tool_parser or settings.tool_parser,
            one.reasoning_parser or settings.reasoning_parser,
            settings.template_variables,
            settings.fold_messages,
        )
        for one in settings.served
    ]
    names = [model.id for model in models]
    names += [alias for one in settings.served for alias in one.aliases]
    for name in names:
        if names.count(name) > 1:
            raise ModelDirectoryError(f"two models go by the name {name}")
    return models


class TokenizerServer:
    """Serves models until `drain`. `port` is the actual port of the gRPC server."""

    def __init__(
        self,
        settings: TokenizerSettings,
        models: Sequence[Model],
        metrics: Metrics,
        keys: KeyFile | None = None,
    ) -> None:
        self.port = 0
        self._settings = settings
        self._background = AsyncExitStack()
        self._own_key = open_own_key(
            "TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE", settings.generator_api_key_file
        )
        self._generator_tls = settings.generator_tls()
        pairs = list(zip(models, settings.served, strict=True))
        self._models = ServedModels(
            {model.id: self._served(model, one) for model, one in pairs},
            {alias: model.id for model, one in pairs for alias in one.aliases},
        )
        metrics.registry.register(
            ReplicaCollector(
                {
                    name: served.connection.replicas.status
                    for name, served in self._models.by_id.items()
                }
            )
        )
        metrics.initialize(self._models.by_id)
        in_flight = InFlight()
        register_process(metrics.registry, in_flight)
        tls = settings.server_tls()
        metrics.registry.register(CertificateCollector(tls, self._generator_tls))
        guard = None
        if keys is not None:
            setting = "TRIVIUM_TOKENIZER_LIMITS_URL"
            limits = open_limits(setting, settings.limits_url, metrics.registry)
            self._background.push_async_callback(limits.close)
            guard = KeyGuard(keys, limits, COMPLETIONS)
        self._server = create_server(
            self._models,
            metrics,
            settings.max_connection_age_seconds,
            in_flight,
            guard,
            settings.reflection,
            tls,
        )

    def _served(self, model: Model, settings: ModelSettings) -> ServedModel:
        connection = GeneratorClient(
            settings.generator_target, model.revision, self._own_key, self._generator_tls
        )
        self._background.push_async_callback(connection.close)
        return ServedModel(
            model,
            connection,
            GeneratorWatch(connection),
            settings.default_max_tokens or self._settings.default_max_tokens,
        )

    async def start(self) -> None:
        """Starts serving: live at once, ready for completions when a generator is."""
        address = address_of(self._settings.host, self._settings.port)
        self.port = await self._server.start(address)
        self._server.set_serving(True, ["", TOKENIZER_SERVICE])
        for served in self._models.by_id.values():
            following = asyncio.create_task(served.watch.run(self._set_ready))
            self._background.push_async_callback(_end, following)

    async def check_ready(self) -> None:
        """Raises ServiceError with the reason if this stage is not ready for completions."""
        try:
            await self._server.check_ready(PIPELINE_SERVICES[0])
        except ServiceError as error:
            if error.code == "model_loading":
                self._models.check_any_available()
            raise

    async def drain(self, stop_now: asyncio.Event | None = None) -> None:
        """Drains as GrpcServer.drain does, then ends all background work."""
        settings = self._settings
        await self._server.drain(settings.drain_notice_seconds, settings.drain_seconds, stop_now)
        await self._background.aclose()

    async def _set_ready(self, changed: bool) -> None:
        """Sets whether this stage is ready, which it is while any generator is."""
        self._server.set_serving(bool(self._models.available), PIPELINE_SERVICES)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
