"""Composition root: starts the engine, builds the service, serves and drains."""

import asyncio
import functools
import logging
import uuid

from prometheus_client.registry import CollectorRegistry

from generator_svc.config import GeneratorSettings
from generator_svc.constraint.compiler import ConstraintCompiler
from generator_svc.convert import Limits
from generator_svc.default_sampling import default_sampling
from generator_svc.delivery import UpdateDispatcher
from generator_svc.engine import Engine
from generator_svc.metering import Meter
from generator_svc.metrics import EngineCollector, RequestMetrics, register_info
from generator_svc.run.runner import OrtRunner
from generator_svc.service import GeneratorService
from generator_svc.startup import build_engine, warm_up
from generator_svc.usage import UsageMetrics, UsageRecorder
from generator_svc.watchdog import step_timed_out
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1.generator_pb2_grpc import add_GeneratorServiceServicer_to_server
from trivium.keys.grpc_guard import KeyGuard
from trivium.keys.key_file import KeyFile
from trivium.model_directory import ModelDirectory
from trivium.usage_log import UsageLog
from trivium.wire.channel import revision_service
from trivium.wire.in_flight import InFlight
from trivium.wire.listening import address_of
from trivium.wire.metrics_server import serve_metrics
from trivium.wire.process_metrics import register_process
from trivium.wire.serving import GrpcServer
from trivium.wire.stop_signals import StopSignals
from trivium.wire.tls.metrics import CertificateCollector

log = logging.getLogger("generator_svc")

SERVICE = "trivium.generator.v1.GeneratorService"


def describe(
    model: ModelDirectory, runner: OrtRunner, settings: GeneratorSettings
) -> pb.GetModelInfoResponse:
    """The response of GetModelInfo."""
    return pb.GetModelInfoResponse(
        id=model.id,
        revision=model.revision,
        context_length=runner.info.slot_length,
        vocabulary_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        execution_provider=runner.info.provider,
        dtype=runner.info.dtype,
        precision=model.precision or "",
        cuda_unavailable=runner.info.cuda_unavailable,
        slots=runner.info.slots,
        kv_cache_bytes=runner.info.cache_bytes,
        max_n=settings.max_n,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        instance_id=uuid.uuid4().hex,
        scores_prompts=runner.info.gives_all_logits,
    )


def build_service(
    settings: GeneratorSettings,
    model: ModelDirectory,
    info: pb.GetModelInfoResponse,
    engine: Engine,
    registry: CollectorRegistry,
    constraints: ConstraintCompiler,
    draining: asyncio.Event,
    usage: UsageRecorder,
) -> GeneratorService:
    """The gRPC service over an engine; registers the metrics of both."""
    limits = Limits(
        revision=model.revision,
        vocabulary_size=model.vocab_size,
        slot_length=info.context_length,
        max_n=settings.max_n,
        eos_token_ids=model.eos_token_ids,
        defaults=default_sampling(model),
        scores_prompts=info.scores_prompts,
    )
    registry.register(EngineCollector(engine.load, engine.cache_usage, engine.meter, model.id))
    metrics = RequestMetrics(registry, model.id)
    return GeneratorService(engine, limits, info, metrics, constraints, draining, usage)


def _open_usage_log(settings: GeneratorSettings, registry: CollectorRegistry) -> UsageLog:
    try:
        return UsageLog(
            settings.usage_log,
            settings.log_name,
            settings.usage_log_max_bytes,
            settings.usage_log_backups,
            registry,
        )
    except OSError as error:
        raise OSError(f"TRIVIUM_GENERATOR_USAGE_LOG: {error}") from error


async def serve(
    settings: GeneratorSettings,
    model: ModelDirectory,
    runner: OrtRunner,
    keys: KeyFile | None = None,
) -> int:
    """Serves until a stop signal or an engine failure; returns the exit status, 0 or 1."""
    signals = StopSignals()  # before anything starts that a signal could interrupt halfway
    async with ConstraintCompiler(
        model.tokenizer, model.vocab_size, model.eos_token_ids, settings.constraint_cache_bytes
    ) as constraints:
        return await serve_constrained(settings, model, runner, constraints, signals, keys)


async def serve_constrained(
    settings: GeneratorSettings,
    model: ModelDirectory,
    runner: OrtRunner,
    constraints: ConstraintCompiler,
    signals: StopSignals,
    keys: KeyFile | None = None,
) -> int:
    loop = asyncio.get_running_loop()
    failed = asyncio.Event()
    step_timeout = settings.on(runner.info.device, "step_timeout_seconds")

    def fail() -> None:
        failed.set()
        signals.first.set()
        signals.second.set()  # a drain would wait for calls that can never finish

    def report_fault(_: BaseException) -> None:
        loop.call_soon_threadsafe(fail)

    async def watch() -> None:
        await step_timed_out(engine.running_step, step_timeout)
        log.critical("the device hangs: a step took over %g s", step_timeout)
        fail()

    meter = Meter()
    dispatcher = UpdateDispatcher(
        loop, settings.max_messages_per_second, settings.max_message_interval_ms / 1000
    )
    engine = build_engine(settings, runner, meter, dispatcher.deliver, report_fault)
    await asyncio.to_thread(engine.start, functools.partial(warm_up, settings, runner, meter))
    if signals.first.is_set():  # not serving yet, so there is nothing to drain
        engine.close()
        return int(failed.is_set())
    registry = CollectorRegistry()
    usage_log = _open_usage_log(settings, registry)
    usage = UsageRecorder(usage_log, UsageMetrics(registry, model.id), model.id)
    server = await _start_server(
        settings, model, runner, engine, registry, constraints, usage, keys
    )
    watchdog = asyncio.create_task(watch())
    await signals.first.wait()
    if not failed.is_set():
        log.info("draining")
    await server.drain(settings.drain_notice_seconds, settings.drain_seconds, signals.second)
    engine.close(0 if watchdog.done() else step_timeout or None)
    watchdog.cancel()
    usage.close()
    return int(failed.is_set())


async def _start_server(
    settings: GeneratorSettings,
    model: ModelDirectory,
    runner: OrtRunner,
    engine: Engine,
    registry: CollectorRegistry,
    constraints: ConstraintCompiler,
    usage: UsageRecorder,
    keys: KeyFile | None,
) -> GrpcServer:
    info = describe(model, runner, settings)
    register_info(registry, model.id, info.precision, runner.info, settings.prefix_cache)
    in_flight = InFlight()
    register_process(registry, in_flight)
    tls = settings.server_tls()
    registry.register(CertificateCollector(tls))
    service = build_service(
        settings, model, info, engine, registry, constraints, in_flight.draining, usage
    )
    server = GrpcServer(
        [(add_GeneratorServiceServicer_to_server, service)],
        [SERVICE],
        [revision_service(SERVICE, model.revision)],
        settings.max_connection_age_seconds,
        in_flight,
        guard=None if keys is None else KeyGuard(keys),
        has_reflection=settings.reflection,
        tls=tls,
        refused=service.refused,
    )
    ready = functools.partial(server.check_ready, SERVICE)
    serve_metrics(settings.metrics_port, settings.host, registry, ready)
    port = await server.start(address_of(settings.host, settings.port))
    server.set_serving(True)
    log.info("serving %s on port %d with %s", model.id, port, info.execution_provider)
    return server
