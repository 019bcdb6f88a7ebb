"""Planning past one machine: `python -m bench.simulate measure | plan | load | check`.

    measure   the costs of the generator's steps on this device, written as JSON
    plan      how many replicas of each stage a load needs to meet latency targets, by policy
    load      the throughput and latency of one replica of each stage with a number of clients, in a
              closed loop as in `trivium bench`
    check     one real replica of each stage compared with its simulation

`plan` and `load` run in virtual time; `plan` replays a random trace, or one read from a file. With
the costs in a file, they need no model. Each simulated replica has its own device, like the one
that was measured.

`check` runs all stages on one machine, where they compete for the CPU: its decode batches are as
slow as a few parallel streams show them to be, just before and after the replay. Costs are measured
before and after too, since a machine's speed drifts. It exits with 1 if output tokens/s or the mean
latency of a request is off by more than 15 %.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import huge_pages, step_costs, trace
from bench.simulation import (
    POLICIES,
    Cluster,
    Result,
    TokenizerCosts,
    simulate,
    simulate_clients,
)
from bench.step_costs import StepCosts, interpolate
from bench.trace import Bursts, Lengths, Request, Workload
from generator_svc.config import GeneratorSettings
from generator_svc.run.runner import OrtRunner
from generator_svc.startup import load_runner
from trivium.cli.answer import Answer
from trivium.cli.http_stream import read_answer
from trivium.cli.load import Client, Target, percentiles
from trivium.cli.pipeline import Pipeline
from trivium.cli.random_prompts import Prompts
from trivium.cli.supervisor import Supervisor
from trivium.embedded_model import embedded_folder
from trivium.model_directory import load_model_directory
from trivium.wire.listening import free_ports

TOLERANCE = 0.15
TEMPLATE_TOKENS = 32  # about what a chat template adds to a prompt
RANKS = (50, 95, 99)
STREAMS = (1, 2, 4, 8, 16)  # concurrent, to show how the stages slow each other down
STREAM_WORDS, STREAM_TOKENS = 64, 48


@dataclass(frozen=True)
class Targets:
    """Limits in seconds for time to first token and inter-token latency, at a percentile."""

    first_token: float
    between_tokens: float
    rank: float

    def are_met(self, result: Result) -> bool:
        """Whether the targets are met and no request was refused."""
        return (
            len(result.served) == len(result.answers)
            and result.first_token(self.rank) <= self.first_token
            and result.between_tokens(self.rank) <= self.between_tokens
        )


@dataclass(frozen=True)
class Plan:
    """The numbers of replicas tried, and the smallest that meet the targets, if any."""

    tried: dict[tuple[int, int], Result]  # by generators and tokenizers
    found: tuple[int, int] | None


def smallest(most: int, is_enough: Callable[[int], bool]) -> int | None:
    """The smallest number from 1 to `most` that is enough, if any; any larger one must be too."""
    low, high = 0, 1
    while not is_enough(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def find_replicas(
    requests: Sequence[Request], cluster: Cluster, policy: str, targets: Targets, most: int
) -> Plan:
    """The fewest generators with `most` tokenizers, then the fewest tokenizers for these."""
    tried: dict[tuple[int, int], Result] = {}

    def is_enough(generators: int, tokenizers: int) -> bool:
        replicas = dataclasses.replace(cluster, generators=generators, tokenizers=tokenizers)
        result = simulate(requests, replicas, policy)
        tried[generators, tokenizers] = result
        return targets.are_met(result)

    generators = smallest(most, lambda count: is_enough(count, most))
    if generators is None:
        return Plan(tried, None)
    tokenizers = smallest(most, lambda count: is_enough(generators, count))
    return Plan(tried, None if tokenizers is None else (generators, tokenizers))


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


def check(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 if the prediction is close enough."""
    runner = open_runner(options.model)
    before = step_costs.measure(runner)
    cluster = cluster_of(options, before, runner)
    rate = options.rate or options.load * capacity(workload(options, 1.0), cluster)
    requests = workload(options, rate, bursts(options)).draw(options.requests, options.seed)
    run = asyncio.run(run_services(options.model, requests, options.seed))
    after = step_costs.measure(runner)
    costs = on_one_machine(step_costs.mean([before, after]), run.gaps)
    drift = after.decode_seconds(8, 128) / before.decode_seconds(8, 128)
    print(f"costs measured after the run are {drift:.2f} times those measured before")
    requests = as_measured(requests, run.answers)
    result = simulate(requests, dataclasses.replace(cluster, costs=costs))
    print(
        f"{len(requests)} requests, {rate:.2f} per second, generator {result.utilization:.0%} busy"
    )
    return show_check(summary_of_simulation(result), summary_of_run(run.answers))


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


def capacity(load: Workload, cluster: Cluster) -> float:
    """Requests per second of one replica of each stage that is never idle."""
    requests = load.draw(4 * cluster.slots, seed=0)
    at_once = [dataclasses.replace(request, arrival=0.0) for request in requests]
    return len(requests) / simulate(at_once, cluster).seconds


def plan(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 if every policy meets the targets with some number of replicas."""
    cluster = cluster_by_costs(options)
    if options.trace is not None:
        requests = trace.load(options.trace)
    else:
        requests = workload(options, options.rate, bursts(options)).draw(
            round(options.rate * options.seconds), options.seed
        )
    if options.save_trace is not None:
        trace.save(options.save_trace, requests)
    targets = Targets(options.first_token, options.between_tokens, options.percentile)
    print(
        f"{len(requests)} requests in {requests[-1].arrival:.0f} s; wanted: p{targets.rank:g} of "
        f"{targets.first_token:g} s to the first token and {targets.between_tokens:g} s between"
    )
    plans = {
        policy: find_replicas(requests, cluster, policy, targets, options.most)
        for policy in options.policies.split(",")
    }
    show_plans(plans)
    return int(any(found.found is None for found in plans.values()))


def show_plans(plans: dict[str, Plan]) -> None:
    """Prints a table of everything tried, with the solutions marked."""
    print(
        f"{'policy':14} {'generators':>10} {'tokenizers':>10} {'first p50/p95/p99 ms':>22} "
        f"{'between p50/p95/p99 ms':>22} {'tokens/s':>9} {'cached':>7} {'busy':>6}"
    )
    for policy, found in plans.items():
        for replicas, result in sorted(found.tried.items()):
            first, between = latencies(result)
            mark = "  enough" if replicas == found.found else ""
            print(
                f"{policy:14} {replicas[0]:10} {replicas[1]:10} {first:>22} {between:>22} "
                f"{result.tokens_per_second:9.0f} {result.cached_share:7.0%} "
                f"{result.utilization:6.0%}{mark}"
            )
        if found.found is None:
            print(f"{policy:14} no number of replicas tried meets the targets")


def load(options: argparse.Namespace) -> int:
    """Prints a line per number of clients."""
    cluster = cluster_by_costs(options)
    print(
        f"{'clients':>7} {'requests':>8} {'tokens/s':>9} {'first p50/p95/p99 ms':>22} "
        f"{'between p50/p95/p99 ms':>22} {'busy':>6}"
    )
    for clients in map(int, options.clients.split(",")):
        requests = workload(options, 1.0).draw(clients * options.requests, options.seed)
        result = simulate_clients(requests, clients, cluster)
        first, between = latencies(result)
        print(
            f"{clients:7} {len(requests):8} {result.tokens_per_second:9.0f} {first:>22} "
            f"{between:>22} {result.utilization:6.0%}"
        )
    return 0


def latencies(result: Result) -> tuple[str, str]:
    """Percentiles of the time to first token and the time between tokens, in ms."""
    first = "/".join(f"{result.first_token(rank) * 1e3:.0f}" for rank in RANKS)
    return first, "/".join(f"{result.between_tokens(rank) * 1e3:.0f}" for rank in RANKS)


def measure(options: argparse.Namespace) -> int:
    step_costs.measure(open_runner(options.model)).save(options.costs)
    return 0


def open_runner(model: Path) -> OrtRunner:
    """Loads the model as the service does."""
    settings = GeneratorSettings(model_directory=model)
    return load_runner(settings, load_model_directory(model))


def cluster_of(
    options: argparse.Namespace, costs: StepCosts, runner: OrtRunner | None = None
) -> Cluster:
    settings = GeneratorSettings(model_directory=options.model)
    tokenizer_costs = TokenizerCosts(
        options.tokenizer_request_us * 1e-6,
        options.tokenizer_prompt_us * 1e-6,
        options.tokenizer_output_us * 1e-6,
        options.hop_us * 1e-6,
    )
    slots, length = (settings.on(costs.device, n) for n in ("slots", "max_sequence_length"))
    if runner is not None:
        slots, length = runner.info.slots, runner.info.slot_length
    return Cluster(costs, tokenizer_costs, slots=slots, slot_length=length)


def cluster_by_costs(options: argparse.Namespace) -> Cluster:
    """The cluster with the costs from the given file, or measured now."""
    if options.costs is not None:
        return cluster_of(options, step_costs.load(options.costs))
    runner = open_runner(options.model)
    return cluster_of(options, step_costs.measure(runner), runner)


def bursts(options: argparse.Namespace) -> Bursts | None:
    """The bursts of the arrivals, or None."""
    is_bursty = options.arrivals == "bursty"
    return Bursts(options.burst_peak, options.burst_share) if is_bursty else None


def workload(options: argparse.Namespace, rate: float, bursts: Bursts | None = None) -> Workload:
    return Workload(
        rate=rate,
        prompt=Lengths(options.prompt_tokens, options.sigma),
        output=Lengths(options.output_tokens, options.sigma),
        bursts=bursts,
        conversations=options.conversations,
        shared_tokens=options.shared_tokens,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command, function in (
        ("measure", measure),
        ("plan", plan),
        ("load", load),
        ("check", check),
    ):
        options = commands.add_parser(
            command, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        options.set_defaults(function=function)
        options.add_argument("--model", type=Path, default=embedded_folder())
        if command != "check":
            help = "JSON file to write, or to read instead of measuring"
            options.add_argument("--costs", type=Path, required=command == "measure", help=help)
        if command in ("plan", "check"):
            _add_arrivals(options)
        if command != "measure":
            _add_load(options)
        if command == "plan":
            _add_targets(options)
        if command == "load":
            options.add_argument("--clients", default="1,8,32,64,256")
            options.add_argument("--requests", type=int, default=10, help="requests per client")
        if command == "check":
            options.add_argument("--rate", type=float, help="requests/s; default: from --load")
            options.add_argument(
                "--load", type=float, default=0.6, help="request rate as a share of the capacity"
            )
            options.add_argument("--requests", type=int, default=50)
    return parser.parse_args()


def _add_arrivals(options: argparse.ArgumentParser) -> None:
    options.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    options.add_argument(
        "--burst-peak", type=float, default=3.0, help="peak rate relative to the mean rate"
    )
    options.add_argument(
        "--burst-share", type=float, default=0.2, help="share of the time that is peak"
    )


def _add_load(options: argparse.ArgumentParser) -> None:
    options.add_argument("--prompt-tokens", type=float, default=115, help="mean")
    options.add_argument("--output-tokens", type=float, default=64, help="mean")
    options.add_argument(
        "--sigma",
        type=float,
        default=0.5,
        help="standard deviation of the logarithms of lengths; 0 for fixed lengths",
    )
    options.add_argument(
        "--conversations",
        type=int,
        default=1,
        help="number of conversations, each of which shares a prefix",
    )
    options.add_argument(
        "--shared-tokens", type=int, default=0, help="length of that prefix in tokens"
    )
    options.add_argument("--seed", type=int, default=0)
    costs = TokenizerCosts()
    options.add_argument("--tokenizer-request-us", type=float, default=costs.request * 1e6)
    options.add_argument("--tokenizer-prompt-us", type=float, default=costs.prompt_token * 1e6)
    options.add_argument("--tokenizer-output-us", type=float, default=costs.output_token * 1e6)
    options.add_argument(
        "--hop-us",
        type=float,
        default=costs.hop * 1e6,
        help="time per message through the facade, each way",
    )


def _add_targets(options: argparse.ArgumentParser) -> None:
    options.add_argument("--rate", type=float, default=8.0, help="requests/s")
    options.add_argument(
        "--seconds", type=float, default=120.0, help="length of the trace in seconds"
    )
    options.add_argument("--trace", type=Path, help="trace to replay instead (JSON lines)")
    options.add_argument("--save-trace", type=Path)
    options.add_argument("--first-token", type=float, default=1.0, help="target, seconds")
    options.add_argument("--between-tokens", type=float, default=0.2, help="target, seconds")
    options.add_argument("--percentile", type=float, default=95.0)
    options.add_argument("--policies", default=",".join(POLICIES))
    options.add_argument(
        "--most", type=int, default=32, help="maximum number of replicas of a stage to try"
    )


def main() -> None:
    huge_pages.restart()
    options = arguments()
    sys.exit(options.function(options))


if __name__ == "__main__":
    main()
