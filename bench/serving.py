"""`python -m bench.serving`: how near the services come to the bare runtime.

Each round measures, one after the other and at each number of clients:

    engine    the engine alone, in this process
    bare      the runner on the very plans that the engine just made, with nothing around it
    services  the three services, streamed over REST
    URL       any other OpenAI-compatible server, if one is named

Medians over the rounds are printed, and the ratio of each to `bare` in its own round, since a
machine's speed drifts. Prompts are all different; `ignore_eos` keeps answers equally long.
"""

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from bench.engine_loop import EngineLoop, LoopResult, replay
from bench.processes import usages
from generator_svc.runner import OrtRunner, choose_device
from trivium.cli.embedded import embedded_folder
from trivium.cli.load import Prompts, Target, open_client, run_level
from trivium.cli.pipeline import Pipeline, free_ports
from trivium.cli.supervisor import Supervisor
from trivium.model_directory import load_model_directory

SLOTS, SLOT_LENGTH = 32, 4096
# What the embedded model's chat template puts before every prompt: cached after the first.
TEMPLATE_TOKENS = 24


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=embedded_folder())
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=3, help="of each client, a round")
    parser.add_argument("--prompt-tokens", type=int, default=115)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--url", action="append", default=[], help="another server to compare")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser.parse_args()


def _percentiles(values: Any) -> dict[str, float]:
    return {f"p{rank}": round(float(np.percentile(values, rank)) * 1000, 2) for rank in (50, 99)}


def _loop_row(result: LoopResult) -> dict[str, Any]:
    return {
        "tokens_per_second": result.tokens / result.seconds,
        "first_ms": _percentiles(result.first),
        "between_ms": _percentiles(result.gaps),
    }


async def _rest_row(target: Target, prompts: Prompts, clients: int, requests: int) -> Any:
    level = await run_level(target, prompts, clients, requests)
    assert not level.failures, level.failures
    tokens = sum(answer.completion_tokens for answer in level.answers)
    return {
        "tokens_per_second": tokens / level.seconds,
        "first_ms": _percentiles([a.first_token_seconds for a in level.answers]),
        "between_ms": _percentiles([gap for a in level.answers for gap in a.gaps]),
    }


async def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = load_model_directory(options.model)
    runner = OrtRunner(model, choose_device("auto"), SLOTS, min(SLOT_LENGTH, model.context_length))
    loop = EngineLoop(runner, model.vocab_size, seed=0)
    ports = free_ports(5)
    pipeline = Pipeline(options.model, "auto", "127.0.0.1", ports[0], "127.0.0.1", *ports[1:])
    shape = (options.prompt_tokens, options.output_tokens)
    rows = []
    async with Supervisor(pipeline.stages(), 30) as supervisor:
        await supervisor.wait_until_ready(120)
        names = {"services": f"{pipeline.url}/v1", **{url: url for url in options.url}}
        targets = {n: Target(root, {}, model.id, *shape) for n, root in names.items()}
        prompts = Prompts(seed=0)
        async with open_client(targets["services"]) as client:
            await prompts.calibrate(client, targets["services"])
        for number in range(options.rounds):
            for clients in map(int, options.clients.split(",")):
                requests = options.requests * (4 if clients == 1 else 1)
                found = await asyncio.to_thread(
                    loop.run, clients, requests, *shape, TEMPLATE_TOKENS
                )
                bare = found.tokens / await asyncio.to_thread(replay, runner, found.plans)
                measured = {"engine": _loop_row(found), "bare": {"tokens_per_second": bare}}
                for name, target in targets.items():
                    before = usages(supervisor.pids())
                    measured[name] = await _rest_row(target, prompts, clients, requests)
                    if name == "services":
                        used = usages(supervisor.pids())
                        measured[name]["cpu_us_per_token"] = {
                            stage: (used[stage].cpu_seconds - before[stage].cpu_seconds)
                            / found.tokens
                            * 1e6
                            for stage in used
                        }
                        measured[name]["peak_mib"] = {
                            stage: use.peak_bytes >> 20 for stage, use in used.items()
                        }
                rows.append({"round": number, "clients": clients, "measured": measured})
    return rows


def _show(rows: list[dict[str, Any]]) -> None:
    print(f"{'clients':>7} {'what':10} {'tokens/s':>9} {'of bare':>8} {'first p50/p99 ms':>20}")
    for clients in sorted({row["clients"] for row in rows}):
        of_level = [row["measured"] for row in rows if row["clients"] == clients]
        for name in of_level[0]:
            speeds = [found[name]["tokens_per_second"] for found in of_level]
            ratios = [
                found[name]["tokens_per_second"] / found["bare"]["tokens_per_second"]
                for found in of_level
            ]
            first = [found[name].get("first_ms") for found in of_level]
            shown = "-"
            if first[0] is not None:
                shown = " / ".join(
                    f"{statistics.median(f[rank] for f in first):.0f}" for rank in ("p50", "p99")
                )
            print(
                f"{clients:7} {name[:10]:10} {statistics.median(speeds):9.1f} "
                f"{statistics.median(ratios):8.2f} {shown:>20}  "
                f"(ratios {min(ratios):.2f} to {max(ratios):.2f})"
            )


def main() -> None:
    options = arguments()
    rows = asyncio.run(_measure(options))
    _show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
