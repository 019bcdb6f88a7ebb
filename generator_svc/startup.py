"""From a model folder to an engine: loads the model, warms it up, and builds what runs on it."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from generator_svc.admission import Admission
from generator_svc.config import GeneratorSettings
from generator_svc.cuda import CudaError, device_count
from generator_svc.device import DeviceError, choose_device, why_not_cuda
from generator_svc.engine import Engine
from generator_svc.kv_cache import SlotCache
from generator_svc.memory_plan import plan_loaded, plan_on, plan_threads
from generator_svc.metering import WARM_UP, Meter
from generator_svc.plan import MIN_CHUNK_TOKENS, Chunk, PromptBatch, Row, StepPlan
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.prompt_batches import MIN_REUSED_TOKENS, padded_length, padded_lengths
from generator_svc.run.outcome import DeviceInfo, RunResult
from generator_svc.run.runner import OrtRunner
from generator_svc.scheduler import Scheduler
from generator_svc.sequence import SequenceUpdate
from trivium.host_limits import cpu_limit
from trivium.model_directory import ModelDirectory

log = logging.getLogger("generator_svc")

_PREFILL_BATCH_SIZE = 32  # on CUDA, where padding is cheap
_WEIGHT_ONLY_GEMM_BLOCK = 32  # the only block size of these kernels in ONNX Runtime's packages

_CAPTURE_SECONDS = 30.0  # at startup; remaining batch sizes are captured on first use
_PLAN_SECONDS = 10.0  # at startup, to plan attention; remaining lengths are planned on first use


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
        log.log(level, "CUDA is unavailable, the model runs on the CPU: %s", reason)
    runner = _load_on("cpu", settings, model)
    runner.info = replace(runner.info, cuda_unavailable=reason)
    return runner


def _load_on(device: str, settings: GeneratorSettings, model: ModelDirectory) -> OrtRunner:
    cpu = cpu_limit()
    threads = settings.threads or plan_threads(cpu.cores, model.weight_bytes)
    plan = plan_on(device, settings, model)
    log.info("%s; %s; threads per run on the CPU: %d", cpu, plan, threads)
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
        log.warning("reloading the model without weight-only GEMM kernels: %s", error)
        runner = None
    if runner is None:
        gc.collect()  # the runner is a reference cycle, and two copies of the weights may not fit
        runner = load(False)
    runner.reallocate(plan_loaded(settings, plan, allocated=slots))
    log.info(
        "allocated %d KV cache slots of %d tokens on the device",
        runner.info.slots,
        runner.info.slot_length,
    )
    return runner


def warm_up(settings: GeneratorSettings, runner: OrtRunner, meter: Meter) -> None:
    """Runs a prefill and a decode; on CUDA also each padded prompt length, and captures the CUDA
    graphs. To be called on the thread that will run the model.

    Raises DeviceError if a run fails or its logits are not finite, CudaError if all runs would.
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
        raise DeviceError(f"running the model failed: {result.error}") from result.error
    if result.logits is None or not np.isfinite(result.logits).all():
        raise DeviceError("the model's logits are not finite")


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
