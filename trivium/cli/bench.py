"""`trivium bench`: the speed of an OpenAI-compatible server, measured by its clients."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import secrets
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from trivium.cli.answer import AnswerFailed, api_root, first_model
from trivium.cli.https import CaFileOption, CertFileOption, KeyFileOption, tls_context
from trivium.cli.load import Level, Target, open_client, run_level
from trivium.cli.random_prompts import Prompts

FAILED, REFUSED = 1, 2
COLUMNS = ("clients", "requests", "failed", "tokens/s", "first token, ms", "between tokens, ms")


def bench(
    url: Annotated[str, typer.Option(help="Base URL, with or without /v1.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[
        str | None, typer.Option(help="Model to use. Default: the first in /v1/models.")
    ] = None,
    clients: Annotated[
        str, typer.Option(help="Numbers of concurrent clients, one run for each.")
    ] = "1,8,32",
    requests: Annotated[
        int, typer.Option(min=1, help="Requests per client, sent one after another.")
    ] = 4,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Approximate prompt length in tokens.")
    ] = 115,
    output_tokens: Annotated[int, typer.Option(min=1, help="Answer length in tokens.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option(help="Send ignore_eos, so that all answers have this length.")
    ] = (True),
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    ca_file: CaFileOption = None,
    cert_file: CertFileOption = None,
    key_file: KeyFileOption = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the random prompts. Default: random.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = (None),
) -> None:
    """Loads a server in a closed loop and prints tokens/s and latencies (p50 / p95 / p99)."""
    try:
        levels = [int(number) for number in clients.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        typer.echo(
            f"trivium bench: --clients: expected numbers such as 1,8,32; got {clients}", err=True
        )
        raise typer.Exit(REFUSED)
    if json_file is not None:
        _check_writable(json_file)
    seed = secrets.randbelow(2**31) if seed is None else seed
    workload = Workload(levels, requests, prompt_tokens, output_tokens, seed)
    context = tls_context(ca_file, cert_file, key_file)
    target = Target(api_root(url), model or "", api_key, ignore_eos, context)
    try:
        report = asyncio.run(_run(target, workload))
    except (AnswerFailed, httpx.HTTPError, httpx.InvalidURL) as error:
        typer.echo(f"trivium bench: {url}: {error or type(error).__name__}", err=True)
        raise typer.Exit(FAILED) from error
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if any(level["failures"] for level in report["levels"]):
        raise typer.Exit(FAILED)


def _check_writable(file: Path) -> None:
    """Exits if the results cannot be written to the file; leaves its content unchanged."""
    try:
        file.open("a").close()
    except OSError as error:
        typer.echo(f"trivium bench: --json {file}: {error.strerror}", err=True)
        raise typer.Exit(REFUSED) from error


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is sent: `levels` are numbers of clients, each of which sends `requests` requests."""

    levels: list[int]
    requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int


async def _run(target: Target, workload: Workload) -> dict[str, Any]:
    console, prompts = Console(), Prompts(workload.seed)
    requests, output_tokens = workload.requests, workload.output_tokens
    async with open_client(target) as client:
        target = await _with_model(client, target)
        await prompts.calibrate(client, target, workload.prompt_tokens)
    summaries = []
    for clients in workload.levels:
        with console.status(f"{clients} clients"):
            level = await run_level(target, prompts.draw, clients, requests, output_tokens)
        summaries.append(level.summary())
        _show_failures(console, level)
    console.print(
        f"{target.model} at {target.root}: about {workload.prompt_tokens} prompt and "
        f"{output_tokens} output tokens, streamed, {requests} requests per client",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table(summaries))
    return {
        "url": target.root,
        "model": target.model,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": output_tokens,
        "ignore_eos": target.ignore_eos,
        "requests_per_client": requests,
        "seed": workload.seed,
        "levels": summaries,
    }


async def _with_model(client: httpx.AsyncClient, target: Target) -> Target:
    if target.model:
        return target
    response = await client.get(f"{target.root}/models")
    return dataclasses.replace(target, model=first_model(response.status_code, response.content))


def _show_failures(console: Console, level: Level) -> None:
    for failure, count in collections.Counter(level.failures).items():
        console.print(f"{count}x {failure}", style="red", markup=False)


def table(summaries: list[dict[str, Any]]) -> Table:
    """One row per number of clients; latencies as p50 / p95 / p99."""
    # Fits a terminal of 80 columns, which is also what a pipe counts as.
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for level in summaries:
        shown.add_row(
            str(level["clients"]),
            str(level["requests"]),
            str(level["failures"]),
            f"{level['output_tokens_per_second']:.1f}",
            _milliseconds(level["time_to_first_token"]),
            _milliseconds(level["time_between_tokens"]),
        )
    return shown


def _milliseconds(values_by_rank: dict[str, float] | None) -> str:
    if values_by_rank is None:
        return "-"
    values = [value * 1000 for value in values_by_rank.values()]
    return " / ".join(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values)
