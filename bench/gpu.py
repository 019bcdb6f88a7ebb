"""How near to the device's memory bandwidth decoding comes, with a Llama of random weights.

    python -m bench.gpu --device cuda --precision fp16,int4 --json FILE
    python -m bench.gpu --small --device cpu

generates the model (8 billion parameters; with --small, a few million) and measures, for each
precision and number of sequences:

    bare          output tokens/s of decode steps on the bare runner, after --prompt tokens
    floor         the minimum time of such a step (reading the weights, keys and values once at the
                  device's copy bandwidth) as a share of the time it took
    engine        output tokens/s of the engine, greedy, from the first prompt to the last token
    sampled       the same with temperature 0.7 and top_p 0.95
    transformers  the same for transformers' generate, in float16 on CUDA, in float32 on the CPU
    genai         the same for onnxruntime-genai on the same folder, with --genai-python

Each candidate runs alone on the device, in its own process. With --profile, the kernels of a decode
step and of a prefill are listed too, and the gaps between them, where PyTorch sees the device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench import huge_pages, kernels, transformers_generate
from bench.kernels import Kernel
from bench.random_llama import (
    BLOCK_SIZE,
    PRECISIONS,
    SHAPES,
    Shape,
    llama_config,
    make_random_llama,
)
from generator_svc.config import GeneratorSettings
from generator_svc.device import choose_device
from generator_svc.metering import Meter
from generator_svc.plan import Chunk, Row, StepPlan
from generator_svc.run.cuda_memory import CudaMemory
from generator_svc.run.runner import OrtRunner
from generator_svc.run.slot_memory import HostMemory
from generator_svc.sequence import EngineRequest, SamplingParams, SequenceUpdate
from generator_svc.startup import build_engine, load_runner, warm_up
from trivium.model_directory import load_model_directory

Result = TypeVar("Result")

COUNTS = (1, 8, 32, 128, 256)
REPEATS = 5
SAMPLINGS = SamplingParams(temperature=0), SamplingParams(temperature=0.7, top_p=0.95)
_GENAI = Path(__file__).with_name("genai.py")
_LARGEST_GENAI_BATCH = 32  # it refuses larger ones


@dataclass(frozen=True)
class Work:
    """What to measure: the model's shape, numbers of sequences, prompt and output tokens."""

    shape: str
    device: str
    counts: tuple[int, ...]
    prompt: int
    output: int
    chunk: int
    copied_bytes: int
    cuda_graphs: bool
    profile: bool = False


@dataclass(frozen=True)
class Decoding:
    """Output tokens/s, except for `floor`, which is a share of the time of a bare step."""

    bare: float
    floor: float
    engine: float
    sampled: float


@dataclass(frozen=True)
class Measured:
    """One model's results on the device; bandwidth in bytes/s, prefill in tokens/s."""

    provider: str
    dtype: str
    slots: int
    weight_bytes: int
    bandwidth: float
    prefill: float
    decoding: dict[int, Decoding]
    kernels: dict[str, list[Kernel]]  # by plan; empty without --profile


def measure(folder: Path, work: Work) -> Measured:
    """Loads the model as the service does, and measures the runner and the engine."""
    settings = _settings(folder, work)
    runner, meter = load_runner(settings, load_model_directory(folder)), Meter()
    warm_up(settings, runner, meter)
    bandwidth = copy_bandwidth(work.device, work.copied_bytes)
    weights = _weight_bytes(folder, SHAPES[work.shape])
    token_bytes = runner.info.cache_bytes // (runner.info.slots * runner.info.slot_length)
    decoding = {}
    for count in (count for count in work.counts if count <= runner.info.slots):
        plan = _decode_plan(count, work.prompt)
        seconds = _median(functools.partial(runner.run, plan))
        floor = (weights + count * work.prompt * token_bytes) / bandwidth
        greedy, sampled = (
            _engine_rate(runner, settings, count, work, sampling) for sampling in SAMPLINGS
        )
        decoding[count] = Decoding(count / seconds, floor / seconds, greedy, sampled)
    chunk = _prefill_plan(work.chunk)
    prefill = work.chunk / _median(functools.partial(runner.run, chunk))
    info = runner.info
    return Measured(
        info.provider,
        info.dtype,
        info.slots,
        weights,
        bandwidth,
        prefill,
        decoding,
        _kernels(runner, list(decoding), work) if work.profile else {},
    )


def _kernels(runner: OrtRunner, counts: Sequence[int], work: Work) -> dict[str, list[Kernel]]:
    runs = {f"a decode step of {count}": _decode_plan(count, work.prompt) for count in counts}
    runs[f"a prompt of {work.chunk} tokens"] = _prefill_plan(work.chunk)
    return {
        name: kernels.recorded(functools.partial(runner.run, plan)) for name, plan in runs.items()
    }


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes/s, read and written together, of copies of `size` bytes on the device."""
    kind = CudaMemory if device == "cuda" else HostMemory
    memory = kind(1, (2, 1, size // 128, 64), np.float16)  # two slots of `size` bytes
    return 2 * size / _best(lambda: memory.copy(0, 1, size // 128))


def _settings(folder: Path, work: Work) -> GeneratorSettings:
    length = max(work.prompt + work.output, work.chunk) + 8
    values: dict[str, Any] = {
        "model_directory": folder,
        "device": work.device,
        "slots": max(work.counts),
        "max_sequence_length": max(length - length % -8, 16),
        "max_queued_requests": 2 * max(work.counts),
        "cuda_graphs": work.cuda_graphs,
    }
    return GeneratorSettings(**values)


def _weight_bytes(folder: Path, shape: Shape) -> int:
    """Bytes of weights that a step reads: all but the embedding, where it reads a few rows."""
    manifest = json.loads((folder / "trivium_export.json").read_text())
    is_half = manifest["precision"] == "fp16" or (
        manifest["device"] == "cuda" and manifest["precision"] != "fp32"
    )
    floats = 2 if is_half else 4
    is_quantized = manifest["precision"] in ("int8", "int4")
    row = shape.hidden * (1 + floats / BLOCK_SIZE) if is_quantized else shape.hidden * floats
    return int(manifest["files"]["model.onnx.data"] - shape.vocabulary * row)


def _decode_plan(count: int, position: int) -> StepPlan:
    return StepPlan(rows=(Row(2, position),) * count)


def _prefill_plan(length: int) -> StepPlan:
    ids = tuple(np.random.default_rng(0).integers(2, 258, length).tolist())
    return StepPlan(chunks=(Chunk(0, 0, ids, True),))


def _engine_rate(
    runner: OrtRunner,
    settings: GeneratorSettings,
    count: int,
    work: Work,
    sampling: SamplingParams,
) -> float:
    """Output tokens/s of `count` simultaneous requests with different prompts."""
    updates: list[SequenceUpdate] = []
    engine = build_engine(settings, runner, Meter(), updates.extend, _raise)
    random = np.random.default_rng(count)
    began = time.perf_counter()
    for prompt in random.integers(2, 258, (count, work.prompt)).tolist():
        engine.submit(EngineRequest(tuple(prompt), work.output, sampling))
    ended = 0
    while ended < count:
        engine.step()
        for update in updates:
            if update.error is not None:
                raise update.error
            ended += update.is_finished
        updates.clear()
    return count * work.output / (time.perf_counter() - began)


def _raise(fault: BaseException) -> None:
    raise fault


def _times(action: Callable[[], Any]) -> list[float]:
    """Seconds of each repetition, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return times[1:]


def _median(action: Callable[[], Any]) -> float:
    return statistics.median(_times(action))


def _best(action: Callable[[], Any]) -> float:
    return min(_times(action))


def genai_rates(python: str, folder: Path, work: Work) -> dict[int, float]:
    """Output tokens/s by number of sequences; empty if it fails, which it reports itself."""
    counts = [count for count in work.counts if count <= _LARGEST_GENAI_BATCH]
    options = {
        "--batch": ",".join(map(str, counts)),
        "--batches": "1",
        "--prompt-tokens": str(work.prompt),
        "--output-tokens": str(work.output),
    }
    command = [
        python,
        str(_GENAI),
        str(folder),
        *(part for pair in options.items() for part in pair),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return {}
    sizes = json.loads(done.stdout)["sizes"]
    return {int(size): found["tokens_per_second"] for size, found in sizes.items()}


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls the function in a separate process, so that it leaves nothing on the device."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def report(precision: str, measured: Measured, others: dict[str, dict[int, float]]) -> str:
    """A table with a row per number of sequences and a column per candidate."""
    lines = [
        f"{precision}: {measured.provider}, cache in {measured.dtype}, {measured.slots} slots; "
        f"a step reads {measured.weight_bytes / 1e9:.3g} GB of weights; "
        f"copies {measured.bandwidth / 1e9:.1f} GB/s; prefill {measured.prefill:.0f} tokens/s",
        f"{'sequences':>9} {'bare':>9} {'floor':>7} {'engine':>9} {'sampled':>9}"
        + "".join(f" {name:>12}" for name in others),
    ]
    for count, row in measured.decoding.items():
        rates = (found.get(count) for found in others.values())
        lines.append(
            f"{count:9} {row.bare:9.1f} {row.floor:7.1%} {row.engine:9.1f} {row.sampled:9.1f}"
            + "".join(f" {rate:12.1f}" if rate else f" {'-':>12}" for rate in rates)
        )
    for name, found in measured.kernels.items():
        lines += [f"{name}:", kernels.table(found)]
    return "\n".join(lines)


def run(work: Work, precisions: Sequence[str], models: Path, genai: str | None) -> dict[str, Any]:
    """Measures everything, prints tables as they are ready, and returns all numbers."""
    found: dict[str, Any] = {"work": dataclasses.asdict(work)}
    transformers_rates: dict[int, float] = {}
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        config = llama_config(SHAPES[work.shape])
        parameters = (config, work.device, work.counts, work.prompt, work.output)
        transformers_rates = in_own_process(transformers_generate.tokens_per_second, *parameters)
    for precision in precisions:
        folder = models / f"random-{work.shape}-{precision}-{work.device}"
        if not folder.exists():
            make_random_llama(folder, SHAPES[work.shape], precision, work.device)
        measured = in_own_process(measure, folder, work)
        others = {
            "transformers": transformers_rates,
            "genai": genai_rates(genai, folder, work) if genai else {},
        }
        print(report(precision, measured, others), flush=True)
        found[precision] = {**dataclasses.asdict(measured), **others}
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="use a model small enough for any CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", default="fp16,int4", help=f"comma-separated, from {', '.join(PRECISIONS)}"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, help="shape of the model; default 8b, or small with --small"
    )
    parser.add_argument("--sequences", default=",".join(map(str, COUNTS)))
    parser.add_argument("--prompt", type=int, help="prompt tokens; default 128, or 16 with --small")
    parser.add_argument("--output", type=int, help="output tokens; default 128, or 8 with --small")
    parser.add_argument("--eager", action="store_true", help="disable CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="list kernels and gaps")
    parser.add_argument(
        "--models", type=Path, help="folder in which to keep the models for the next run"
    )
    parser.add_argument("--genai-python", help="Python interpreter that has onnxruntime-genai")
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args()


def main() -> None:
    huge_pages.restart()
    options = arguments()
    small = options.small
    work = Work(
        shape=options.shape or ("small" if small else "8b"),
        device=choose_device(options.device),
        counts=tuple(map(int, options.sequences.split(","))),
        prompt=options.prompt or (16 if small else 128),
        output=options.output or (8 if small else 128),
        chunk=64 if small else 512,
        copied_bytes=2**26 if small else 2**28,
        cuda_graphs=not options.eager,
        profile=options.profile,
    )
    if work.profile and (reason := kernels.why_not()):
        sys.exit(f"--profile: {reason}")
    genai = options.genai_python
    if genai is None and importlib.util.find_spec("onnxruntime_genai"):
        genai = sys.executable
    with tempfile.TemporaryDirectory() as temporary:
        models = options.models or Path(temporary)
        found = run(work, options.precision.split(","), models, genai)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
