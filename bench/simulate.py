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
import dataclasses
import sys
from pathlib import Path

from bench import huge_pages, step_costs, trace
from bench.planning import Plan, Targets, find_replicas
from bench.replay import (
    as_measured,
    on_one_machine,
    run_services,
    show_check,
    summary_of_run,
    summary_of_simulation,
)
from bench.simulation import (
    POLICIES,
    Cluster,
    Result,
    TokenizerCosts,
    simulate,
    simulate_clients,
)
from bench.step_costs import StepCosts
from bench.trace import Bursts, Lengths, Workload
from generator_svc.config import GeneratorSettings
from generator_svc.run.runner import OrtRunner
from generator_svc.startup import load_runner
from trivium.embedded_model import embedded_folder
from trivium.model_directory import load_model_directory

RANKS = (50, 95, 99)


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
