"""Composition root: loads the model, warms it up, builds engine and service, serves and drains."""

import asyncio
import functools
import gc
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from prometheus_client.registry import CollectorRegistry

from generator_svc.admission import Admission
from generator_svc.config import GeneratorSettings
from generator_svc.constraint.compiler import ConstraintCompiler
from generator_svc.convert import Limits
from generator_svc.cuda import CudaError, device_count
from generator_svc.default_sampling import default_sampling
from generator_svc.delivery import UpdateDispatcher
from generator_svc.device import DeviceError, choose_device, why_not_cuda
from generator_svc.engine import Engine
from generator_svc.kv_cache import SlotCache
from generator_svc.memory_plan import plan_loaded, plan_on, plan_threads
from generator_svc.metering import WARM_UP, Meter
from generator_svc.metrics import EngineCollector, RequestMetrics, register_info
from generator_svc.plan import MIN_CHUNK_TOKENS, Chunk, PromptBatch, Row, StepPlan
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.prompt_batches import MIN_REUSED_TOKENS, padded_length, padded_lengths
from generator_svc.run.outcome import DeviceInfo, RunResult
from generator_svc.run.runner import OrtRunner
from generator_svc.scheduler import Scheduler
from generator_svc.sequence import SequenceUpdate
from generator_svc.service import GeneratorService
from generator_svc.usage import UsageMetrics, UsageRecorder
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1.generator_pb2_grpc import add_GeneratorServiceServicer_to_server
from trivium.host_limits import cpu_limit
from trivium.keys.door import Door
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

_PREFILL_BATCH_SIZE = 32  # on CUDA, where padding is cheap
_WEIGHT_ONLY_GEMM_BLOCK = 32  # the only block size of these kernels in ONNX Runtime's packages

_CAPTURE_SECONDS = 30.0  # at startup; remaining batch sizes are captured on first use
_PLAN_SECONDS = 10.0  # at startup, to plan attention; remaining lengths are planned on first use

SERVICE = "trivium.generator.v1.GeneratorService"


def load_runner(settings: GeneratorSettings, model: ModelDirectory) -> OrtRunner:
    """Loads the model onto its device, with as many slots as memory allows.

    Device `auto` falls back to the CPU if CUDA is unavailable or the model fails to run on it.
    Raises DeviceError, CudaError or MemoryPlanError.
    """
    device = choose_device(settings.device)
    reason = why_not_cuda() if settings.device == "auto" else ""
    if device == "cuda":
        try:
            return _load_on(device, settings, model)
        except (DeviceError, CudaError) as error:
            if settings.device != "auto":
                raise
            reason = str(error)
    if reason:  # not a warning on a machine without a CUDA device
        level = logging.WARNING if device_count() else logging.INFO
        log.log(level, "the model runs on the CPU, without CUDA: %s", reason)
    runner = _load_on("cpu", settings, model)
    runner.info = replace(runner.info, cuda_unavailable=reason)
    return runner


def _load_on(device: str, settings: GeneratorSettings, model: ModelDirectory) -> OrtRunner:
    cpu = cpu_limit()
    threads = settings.threads or plan_threads(cpu.cores, model.weight_bytes)
    plan = plan_on(device, settings, model)
    log.info("%s; %s; threads of a run on the CPU: %d", cpu, plan, threads)
    # ONNX Runtime places some float32 nodes on the CPU, and then refuses to capture the graph.
    cuda_graphs = settings.cuda_graphs and device == "cuda" and model.precision != "fp32"
    if device == "cpu":
        return OrtRunner(model, device, plan.slots, plan.slot_length, threads)

    positions = padded_length(settings.on(device, "max_num_batched_tokens"))
    length = min(positions, plan.slot_length)
    slots = min(plan.slots, -(-positions // length), _PREFILL_BATCH_SIZE)

    def load(weight_only_gemm: bool) -> OrtRunner:
        runner = OrtRunner(
            model, device, slots, plan.slot_length, threads, cuda_graphs, weight_only_gemm
        )
        # The runtime's arena keeps the memory of the largest run.
        tokens = (0,) * length
        largest = StepPlan(chunks=(Chunk(0, 0, tokens, wants_logits=True),))
        if runner.info.pads_prompts:
            largest = StepPlan(batches=(PromptBatch(0, (tokens,) * slots, length, (1.0,) * slots),))
        _check(runner.run(largest).prefills[0])
        return runner

    weight_only_gemm = model.manifest.get("symmetric_block_size") == _WEIGHT_ONLY_GEMM_BLOCK
    try:
        runner = load(weight_only_gemm)
    except DeviceError as error:
        if not weight_only_gemm:
            raise
        # For example, there is no kernel for one of the matrix widths.
        log.warning("the model is loaded again without weight-only products: %s", error)
        runner = None
    if runner is None:
        gc.collect()  # the runner is a reference cycle, and two copies of the weights may not fit
        runner = load(False)
    runner.reallocate(plan_loaded(settings, plan, allocated=slots))
    log.info("%d slots of %d tokens on the device", runner.info.slots, runner.info.slot_length)
    return runner


def warm_up(settings: GeneratorSettings, runner: OrtRunner, meter: Meter) -> None:
    """Runs a prefill and a decode; on CUDA also each padded prompt length, and captures the CUDA
    graphs. To be called on the thread that will run the model.

    Raises DeviceError if a run fails or its logits are not finite.
    """

    def run(plan: StepPlan) -> None:
        outcome = runner.run(plan)
        for result in (*outcome.batches, *outcome.chunks, outcome.rows):
            if result is not None:
                meter.charge_overhead(result.nanoseconds, WARM_UP)
                _check(result)

    prefill = Chunk(slot=0, start=0, token_ids=(0, 0, 0), wants_logits=True)
    run(StepPlan(chunks=(prefill,), rows=(Row(0, 3),)))
    if runner.info.pads_prompts and runner.info.device == "cuda":
        # The first run of a length plans its attention, which takes longer than most runs do.
        started = time.monotonic()
        longest = settings.on("cuda", "max_num_batched_tokens")
        for length in padded_lengths(longest, runner.info.slot_length):
            if time.monotonic() - started > _PLAN_SECONDS:
                break
            run(StepPlan(batches=(PromptBatch(0, ((0,) * length,), length, (None,)),)))
    meter.charge_overhead(runner.capture(_CAPTURE_SECONDS), WARM_UP)


def _check(result: RunResult) -> None:
    if result.error is not None:
        raise DeviceError(f"the model cannot be run: {result.error}") from result.error
    if result.logits is None or not np.isfinite(result.logits).all():
        raise DeviceError("the model's logits are not finite")


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


def build_engine(
    settings: GeneratorSettings,
    runner: OrtRunner,
    meter: Meter,
    deliver: Callable[[list[SequenceUpdate]], None],
    on_fault: Callable[[BaseException], None],
) -> Engine:
    """An engine with its scheduler, slots and queue, not started; callbacks as in Engine."""
    info, batch_size = runner.info, _prefill_batch_size(settings, runner.info)
    min_reused_tokens = MIN_REUSED_TOKENS if batch_size else MIN_CHUNK_TOKENS
    cache = SlotCache(info.slots, info.slot_length, settings.prefix_cache, min_reused_tokens)
    stall_nanoseconds = settings.prefill_stall_ms * 1_000_000
    scheduler = Scheduler(
        cache,
        PrefillCostModel(),
        stall_nanoseconds,
        settings.on(info.device, "max_num_batched_tokens"),
        meter.settle,
        info.capture_sizes,
        batch_size,
    )
    admission = Admission(settings.max_queued_requests, settings.max_queued_tokens)
    return Engine(scheduler, runner, meter, admission, deliver, on_fault)


def _prefill_batch_size(settings: GeneratorSettings, info: DeviceInfo) -> int:
    if not info.pads_prompts:
        return 0
    default = _PREFILL_BATCH_SIZE if info.device == "cuda" else 0
    return settings.max_prefill_batch_size or default


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
    faulted = asyncio.Event()

    def end_at_once() -> None:
        faulted.set()
        signals.second.set()  # a drain would wait for calls that can never finish

    def report_fault(fault: BaseException) -> None:
        loop.call_soon_threadsafe(end_at_once)

    meter = Meter()
    dispatcher = UpdateDispatcher(
        loop, settings.max_messages_per_second, settings.max_message_interval_ms / 1000
    )
    engine = build_engine(settings, runner, meter, dispatcher.deliver, report_fault)
    await asyncio.to_thread(engine.start, functools.partial(warm_up, settings, runner, meter))
    if signals.first.is_set():  # not serving yet, so there is nothing to drain
        engine.close()
        return 0
    info = describe(model, runner, settings)
    registry = CollectorRegistry()
    precision = model.precision or ""
    register_info(registry, model.id, precision, runner.info, settings.prefix_cache)
    in_flight = InFlight()
    register_process(registry, in_flight)
    tls = settings.server_tls()
    registry.register(CertificateCollector(tls))
    usage_log = _open_usage_log(settings, registry)
    usage = UsageRecorder(usage_log, UsageMetrics(registry, model.id), model.id)
    service = build_service(
        settings, model, info, engine, registry, constraints, in_flight.draining, usage
    )
    server = GrpcServer(
        [(add_GeneratorServiceServicer_to_server, service)],
        [SERVICE],
        [revision_service(SERVICE, model.revision)],
        settings.max_connection_age_seconds,
        in_flight,
        guard=None if keys is None else Door(keys),
        has_reflection=settings.reflection,
        tls=tls,
        refused=service.refused,
    )
    ready = functools.partial(server.check_ready, SERVICE)
    serve_metrics(settings.metrics_port, settings.host, registry, ready)
    port = await server.start(address_of(settings.host, settings.port))
    await server.set_serving(True)
    log.info("serving %s on port %d by %s", model.id, port, info.execution_provider)
    stop, fault = asyncio.create_task(signals.first.wait()), asyncio.create_task(faulted.wait())
    await asyncio.wait({stop, fault}, return_when=asyncio.FIRST_COMPLETED)
    if not faulted.is_set():
        log.info("draining")
    await server.drain(settings.drain_notice_seconds, settings.drain_seconds, signals.second)
    engine.close()
    usage.close()
    return int(faulted.is_set())
