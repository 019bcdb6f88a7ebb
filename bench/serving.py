"""`python -m bench.serving`: how near the services come to the bare runtime, and to others.

Every round plays the same requests, which are in no cache, with one contender after another: the
engine alone, the bare runner on the engine's own plans, the three services over REST, and any
others that are named. bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import os
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx

from bench import huge_pages
from bench.contenders import (
    READY_SECONDS,
    Bare,
    Contender,
    Engine,
    GenAi,
    LlamaServer,
    Services,
    Url,
)
from bench.measures import Numbers, checks, costs
from bench.play import Answer, Play, Recording, Script
from bench.prompts import Prompts, Text
from bench.report import Results, Row, as_json, machine, notes, page, tables, with_results
from bench.scenarios import Choices, Load, LongPrompt, Scenario, SharedSystemPrompt, Turns
from bench.worker import Worker
from generator_svc.run.outcome import DeviceInfo
from trivium.cli.load import Target
from trivium.cli.pipeline import Pipeline
from trivium.cli.supervisor import Stage, Supervisor
from trivium.embedded_model import embedded_folder
from trivium.wire.listening import free_ports

NAMES = ("load", "sampled", "long", "shared", "turns", "streams", "choices", "stall")
CEILING = "ceiling"  # only if named: it needs a model that costs nothing
CEILING_CLIENTS, CEILING_OUTPUT = (1, 8, 32, 64, 256), 256
CLIENTS = (1, 8, 32)
LONG_CLIENTS, LONG_PROMPT = (1, 8), 1000
TEMPERATURE, TOP_P = 0.7, 0.95  # for "sampled"
STREAMS = 256
LATE_PROMPT, LATE_ROOM = 4000, 16
STOP_SECONDS = 30.0
SETTLE_SECONDS = 1.5  # for a contender's idle-time work, so that it is not done in another's turn
WARM_UP = Load("warm up", clients=2, requests=1, prompt=64, output=8)
MAX_ERRORS = 3  # reported per measurement


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=embedded_folder())
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add(
        "--scenarios",
        default=",".join(NAMES),
        help=f"comma-separated, from the default ones and {CEILING}",
    )
    add("--rounds", type=int, default=5)
    add(
        "--clients",
        help="numbers of clients in load, sampled and ceiling; default 1,8,32, for "
        "ceiling up to 256",
    )
    add("--requests", type=int, default=3, help="requests per client in load, sampled and long")
    add(
        "--prompt-tokens",
        type=int,
        default=115,
        help="prompt length in load, sampled, streams and ceiling",
    )
    add(
        "--output-tokens",
        type=int,
        default=64,
        help="output length in load, sampled, long and streams",
    )
    add(
        "--contender",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout whose services are measured too",
    )
    add(
        "--url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a running server to measure too",
    )
    add(
        "--llama-server",
        type=Path,
        metavar="BINARY",
        help="a llama-server to start; requires --gguf",
    )
    add("--gguf", type=Path, metavar="FILE", help="model for llama-server")
    add(
        "--genai", type=Path, metavar="PYTHON", help="Python interpreter that has onnxruntime-genai"
    )
    add("--seed", type=int, default=secrets.randbelow(2**31), help="seed of the prompts")
    add("--json", type=Path, metavar="FILE", help="file for all results, written after every round")
    add("--markdown", type=Path, metavar="FILE", help="page whose results section to replace")
    options = parser.parse_args()
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks options early that would otherwise fail after an hour."""
    unknown = set(options.scenarios.split(",")) - {*NAMES, CEILING}
    if unknown:
        parser.error(f"--scenarios: unknown: {', '.join(sorted(unknown))}")
    if any("=" not in named for named in options.url):
        parser.error("--url: expected NAME=URL")
    if options.contender and not (options.contender / "generator_svc").is_dir():
        parser.error(f"--contender: {options.contender} is not a checkout of this project")
    if (options.llama_server is None) != (options.gguf is None):
        parser.error("--llama-server and --gguf must be used together")
    if options.markdown:
        try:
            with_results(options.markdown.read_text(), "")
        except (OSError, ValueError) as error:
            parser.error(f"--markdown: {error}")


def scenarios(options: argparse.Namespace, longest: int) -> list[Scenario]:
    """The requested scenarios that fit into a slot of `longest` tokens."""
    prompt, output, requests = options.prompt_tokens, options.output_tokens, options.requests
    client_counts = [int(number) for number in (options.clients or "").split(",") if number]
    found: list[Scenario] = [
        *(
            Load("load", n, requests * (4 if n == 1 else 1), prompt, output)
            for n in client_counts or CLIENTS
        ),
        *(
            Load("sampled", n, requests, prompt, output, temperature=TEMPERATURE, top_p=TOP_P)
            for n in client_counts or CLIENTS
        ),
        *(Load("long", n, requests, LONG_PROMPT, output) for n in LONG_CLIENTS),
        SharedSystemPrompt(),
        Turns(),
        Load("streams", STREAMS, 1, prompt, output),
        Choices(),
        LongPrompt(prompt=min(LATE_PROMPT, longest - LATE_ROOM)),
        *(
            Load(CEILING, n, max(2, 48 // n), prompt, CEILING_OUTPUT)
            for n in client_counts or CEILING_CLIENTS
        ),
    ]
    chosen = [each for each in found if each.name in options.scenarios.split(",")]
    for each in chosen:
        if each.length > longest:
            _log(f"{each.name} is skipped: a slot has {longest} tokens, but it needs {each.length}")
    return [each for each in chosen if each.length <= longest]


class Recorder:
    """Plays scripts with one contender, and keeps the results."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self.played: list[tuple[Script, Play]] = []

    def play(self, script: Script) -> Sequence[Answer]:
        play = self._contender.play(script)
        self.played.append((script, play))
        return play.answers

    def numbers(self) -> Numbers:
        """Costs and checks of everything played."""
        checked: Counter[str] = Counter()
        for script, play in self.played:
            checked.update(checks(script, play))
        return {**costs([play for _, play in self.played]), **checked}

    def faults(self) -> tuple[str, ...]:
        """The first few distinct errors."""
        faults = (answer.fault for _, play in self.played for answer in play.answers)
        return tuple(itertools.islice(dict.fromkeys(filter(None, faults)), MAX_ERRORS))


def measure(scenario: Scenario, contender: Contender, prompts: Prompts, number: int) -> Row:
    """Measures one scenario with one contender, in round `number`."""
    recorder = Recorder(contender)
    with contender.turn(scenario):
        numbers = scenario.run(recorder, prompts)
    numbers = {**numbers, **recorder.numbers()}
    return Row(scenario.name, scenario.case, number, contender.name, numbers, recorder.faults())


def rounds(
    options: argparse.Namespace,
    planned: list[Scenario],
    contenders: list[list[Contender]],
    text: Text,
) -> Iterator[list[Row]]:
    """The rows of each round. Every second round reverses the groups of contenders."""
    for number in range(options.rounds):
        rows = []
        groups = contenders[::-1] if number % 2 else contenders
        for scenario in planned:
            for contender in itertools.chain(*groups):
                if contender.supports(scenario):
                    seed = f"{options.seed}/{number}/{scenario.name}/{scenario.case}"
                    rows.append(measure(scenario, contender, Prompts(text, seed), number))
                    _log(f"round {number + 1} of {options.rounds}: {_summary(rows[-1])}")
                    time.sleep(SETTLE_SECONDS)
        yield rows


def _summary(row: Row) -> str:
    shown = (f"{name} {value:.4g}" for name, value in itertools.islice(row.numbers.items(), 3))
    return f"{row.scenario} {row.case}, {row.contender}: {', '.join(shown)}"


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def started(pipeline: Pipeline, checkout: Path | None = None) -> Iterator[Supervisor]:
    """The three services, ready; those of another checkout if one is given."""
    stages = pipeline.stages()
    if checkout is not None:
        stages = [_from_checkout(stage, checkout.resolve()) for stage in stages]
    with asyncio.Runner() as loop:
        supervisor = Supervisor(stages, STOP_SECONDS)
        loop.run(supervisor.__aenter__())
        try:
            loop.run(supervisor.wait_until_ready(READY_SECONDS))
            yield supervisor
        finally:
            loop.run(supervisor.__aexit__(None, None, None))


def _from_checkout(stage: Stage, checkout: Path) -> Stage:
    interpreter, *rest = stage.command
    # Without -P, modules in the current folder would take precedence.
    command = (interpreter, "-P", *rest)
    return replace(
        stage, command=command, environment={**stage.environment, "PYTHONPATH": str(checkout)}
    )


def _servers(options: argparse.Namespace, client: Worker) -> Iterator[list[Contender]]:
    """The other servers named in the options."""
    key = os.environ.get("OPENAI_API_KEY", "")
    for name, _, root in (named.partition("=") for named in options.url):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        models = httpx.get(f"{root}/models", headers=headers, trust_env=False).raise_for_status()
        yield [Url(name, Target(root, models.json()["data"][0]["id"], key), client)]
    if options.llama_server:
        yield [LlamaServer(options.llama_server, options.gguf, client)]
    if options.genai:
        yield [GenAi(options.genai, options.model)]


def _pipeline(options: argparse.Namespace) -> Pipeline:
    """The services on free ports."""
    facade, tokenizer, tokenizer_metrics, generator, generator_metrics = free_ports(5)
    return Pipeline(
        options.model,
        options.device,
        port=facade,
        tokenizer_port=tokenizer,
        tokenizer_metrics_port=tokenizer_metrics,
        generator_port=generator,
        generator_metrics_port=generator_metrics,
    )


def run(options: argparse.Namespace) -> None:
    """Starts all contenders, measures and reports."""
    folder = options.model, options.device
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Worker("bench.engine_loop:EngineLoop", *folder))
        info: DeviceInfo = engine.call("info")
        os.environ |= _same_slots(info)
        bare = stack.enter_context(Worker("bench.engine_loop:BareRunner", *folder))
        client = stack.enter_context(Worker("bench.load_client:LoadClient"))
        pipeline = _pipeline(options)
        supervisor = stack.enter_context(started(pipeline))
        text = stack.enter_context(contextlib.closing(Text(pipeline.url, options.model.name)))
        recordings: deque[Recording] = deque()
        target = Target(f"{pipeline.url}/v1", options.model.name)
        own: list[list[Contender]] = [
            [Engine(engine, recordings), Bare(bare, recordings)],
            [Services(target, client, supervisor)],
        ]
        if options.contender:
            others = _pipeline(options)
            other = stack.enter_context(started(others, options.contender))
            target = Target(f"{others.url}/v1", options.model.name)
            own.append([Services(target, client, other, options.contender.resolve().name)])
        for contender in itertools.chain(*own):
            measure(WARM_UP, contender, Prompts(text, "warm up"), 0)
        contenders = [*own, *_servers(options, client)]
        planned = scenarios(options, info.slot_length)
        results = Results([], {each.name: each.title for each in planned})
        for rows in rounds(options, planned, contenders, text):
            results = replace(results, rows=[*results.rows, *rows])
            save(options, results, _about(options, results, info, contenders))
    show(results)


def show(results: Results) -> None:
    """Prints the tables and notes."""
    for table in tables(results):
        print(table.text(), end="\n\n")
    for note in notes(results):
        print(f"note: {note}")


def save(options: argparse.Namespace, results: Results, about: dict[str, object]) -> None:
    """Writes the results so far to the requested files."""
    if options.json:
        options.json.write_text(json.dumps(as_json(results, about), indent=1) + "\n")
    if options.markdown:
        text = options.markdown.read_text()
        options.markdown.write_text(with_results(text, page(results, about)))


def _same_slots(info: DeviceInfo) -> dict[str, str]:
    """Settings that give later generators the first one's KV cache, however much memory is left."""
    return {
        "TRIVIUM_GENERATOR_SLOTS": str(info.slots),
        "TRIVIUM_GENERATOR_KV_CACHE_BYTES": str(info.cache_bytes),
    }


def _about(
    options: argparse.Namespace,
    results: Results,
    info: DeviceInfo,
    contenders: list[list[Contender]],
) -> dict[str, object]:
    return {
        **machine(),
        "rounds": len({row.round for row in results.rows}),
        "seed": options.seed,
        "model": options.model.name,
        "slots": info.slots,
        "provider": info.provider,
        "onnxruntime": importlib.metadata.version("onnxruntime-gpu"),
        **{each.name: each.version for each in itertools.chain(*contenders) if each.version},
    }


def main() -> None:
    huge_pages.restart()
    run(arguments())


if __name__ == "__main__":
    main()
