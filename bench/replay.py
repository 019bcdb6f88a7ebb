"""A trace, replayed by one real replica of each stage, and the comparison with its simulation."""

import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.simulation import Result
from bench.step_costs import StepCosts, interpolate
from bench.trace import Request
from trivium.cli.answer import Answer
from trivium.cli.http_stream import read_answer
from trivium.cli.load import Client, Target, percentiles
from trivium.cli.pipeline import Pipeline
from trivium.cli.random_prompts import Prompts
from trivium.cli.supervisor import Supervisor
from trivium.model_directory import load_model_directory
from trivium.wire.listening import free_ports

TOLERANCE = 0.15
TEMPLATE_TOKENS = 32  # about what a chat template adds to a prompt
STREAMS = (1, 2, 4, 8, 16)  # concurrent, to show how the stages slow each other down
STREAM_WORDS, STREAM_TOKENS = 64, 48


async def replay(target: Target, prompts: Prompts, requests: Sequence[Request]) -> list[Answer]:
    """Sends each request at its arrival time, whatever the state of earlier ones."""
    start = time.perf_counter() - requests[0].arrival

    async def one(request: Request) -> Answer:
        prompt = prompts.draw(max(1, request.prompt_tokens - TEMPLATE_TOKENS))
        due = start + request.arrival
        await asyncio.sleep(due - time.perf_counter())
        return await _send(target, prompt, request.output_tokens, due)

    return await asyncio.gather(*(one(request) for request in requests))


async def between_tokens(target: Target, prompts: Prompts) -> dict[int, float]:
    """Median seconds between tokens, by the number of concurrent streams."""
    found = {}
    for streams in STREAMS:
        asking = [
            _send(target, prompts.draw(STREAM_WORDS), STREAM_TOKENS, time.perf_counter())
            for _ in range(streams)
        ]
        answers = await asyncio.gather(*asking)
        found[streams] = statistics.median(gap for answer in answers for gap in answer.gaps)
    return found


async def _send(target: Target, prompt: str, output_tokens: int, began: float) -> Answer:
    body = target.body([{"role": "user", "content": prompt}], output_tokens)
    with contextlib.closing(Client(target)) as client:
        return read_answer(began, await client.send(target.request(body)))


@dataclass(frozen=True)
class Run:
    """A run of one replica per stage: the answers to a trace, and `between_tokens` around it."""

    answers: Sequence[Answer]
    gaps: Sequence[dict[int, float]]


async def run_services(model: Path, requests: Sequence[Request], seed: int) -> Run:
    """Starts the services, replays the trace, stops them."""
    port, *behind = free_ports(5)
    pipeline = Pipeline(
        model,
        port=port,
        tokenizer_port=behind[0],
        tokenizer_metrics_port=behind[1],
        generator_port=behind[2],
        generator_metrics_port=behind[3],
    )
    target = Target(f"{pipeline.url}/v1", load_model_directory(model).id)
    prompts = Prompts(seed)
    async with Supervisor(pipeline.stages(), 30) as supervisor:
        await supervisor.wait_until_ready(120)
        await between_tokens(target, prompts)  # warm-up
        before = await between_tokens(target, prompts)
        answers = await replay(target, prompts, requests)
        return Run(answers, [before, await between_tokens(target, prompts)])


def on_one_machine(costs: StepCosts, gaps: Sequence[dict[int, float]]) -> StepCosts:
    """The costs, with decode batches as slow as the measured time between tokens."""
    context = TEMPLATE_TOKENS + STREAM_WORDS + STREAM_TOKENS / 2
    seen = [statistics.fmean(gap[streams] for gap in gaps) for streams in STREAMS]

    def seconds(rows: int, at: int) -> float:
        alone = costs.decode_seconds(rows, context) + costs.around_seconds(rows)
        return costs.decode_seconds(rows, at) + interpolate(STREAMS, seen, rows) - alone

    decode = tuple(tuple(seconds(rows, at) for rows in STREAMS) for at in costs.contexts)
    return dataclasses.replace(costs, rows=STREAMS, decode=decode)


def as_measured(requests: Sequence[Request], answers: Sequence[Answer]) -> list[Request]:
    """The trace with the prompt lengths and cached tokens that the server reported."""
    cached = [a.usage["prompt_tokens_details"]["cached_tokens"] for a in answers]
    return [
        dataclasses.replace(
            request,
            prompt_tokens=answer.usage["prompt_tokens"],
            shared_tokens=round(statistics.median(cached)),
        )
        for request, answer in zip(requests, answers, strict=True)
    ]


def summary_of_run(answers: Sequence[Answer]) -> dict[str, float]:
    """The clients' measurements; times in seconds."""
    first = percentiles([a.first_token_seconds for a in answers if a.first_token_seconds])
    gaps = percentiles([gap for answer in answers for gap in answer.gaps])
    assert first is not None
    assert gaps is not None
    seconds = max(a.ended for a in answers) - min(a.began for a in answers)
    return {
        "output tokens/s": sum(a.completion_tokens for a in answers) / seconds,
        "mean latency": statistics.fmean(a.ended - a.began for a in answers),
        "first token, median": first["p50"],
        "first token, p95": first["p95"],
        "between tokens, median": gaps["p50"],
        "between tokens, p99": gaps["p99"],
        "device seconds": sum(answer.usage["gpu_seconds"] for answer in answers),
    }


def summary_of_simulation(result: Result) -> dict[str, float]:
    """The same numbers from a simulation."""
    return {
        "output tokens/s": result.tokens_per_second,
        "mean latency": statistics.fmean(answer.seconds for answer in result.served),
        "first token, median": result.first_token(50),
        "first token, p95": result.first_token(95),
        "between tokens, median": result.between_tokens(50),
        "between tokens, p99": result.between_tokens(99),
        "device seconds": sum(answer.device_seconds for answer in result.served),
    }


def show_check(predicted: dict[str, float], measured: dict[str, float]) -> int:
    """Prints a table; returns the exit status."""
    print(f"{'seconds unless noted':24} {'predicted':>10} {'measured':>10} {'error':>7}")
    errors = {name: predicted[name] / value - 1 for name, value in measured.items()}
    for name, value in measured.items():
        print(f"{name:24} {predicted[name]:10.4g} {value:10.4g} {errors[name]:+7.1%}")
    names = ("output tokens/s", "mean latency")
    worst = max(abs(errors[name]) for name in names)
    print(f"{' and '.join(names)}: error of at most {worst:.1%}, tolerance {TOLERANCE:.0%}")
    return int(worst > TOLERANCE)
