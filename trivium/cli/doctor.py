"""`trivium doctor`: checks the installation, the devices, the ports and the model.

Each check is a function that returns findings; printing them is separate.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer

from trivium.cli import providers
from trivium.cli.gpus import gpus
from trivium.cli.models import possible_folders
from trivium.cli.pipeline import Pipeline, PortTaken
from trivium.cli.supervisor import NotReady, StageDied, Supervisor
from trivium.cli.up import Device
from trivium.embedded_model import EMBEDDED_MODEL, embedded_folder
from trivium.export_extra import missing_packages
from trivium.host_limits import cpu_limit, memory_limit
from trivium.model_directory import ModelDirectory, ModelDirectoryError, load_model_directory
from trivium.wire.listening import free_ports

FAILED = 1
SMOKE_TOKENS = 5
PACKAGES = ("grpcio", "protobuf", "fastapi", "uvicorn", "pydantic", "tokenizers", "numpy")
# Parts of settings that the smoke run drops: it serves one model, without TLS, keys or records.
_UNSET_VARIABLES = ("_TLS_", "_API_KEY", "_USAGE_LOG", "_TOKENIZER_MODELS")
GOOD, NOTE, BAD = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only a BAD verdict makes the command fail."""

    verdict: str
    subject: str
    text: str


def check_installation() -> Iterator[Finding]:
    """Versions of Python, Trivium and its dependencies."""
    version = platform.python_version()
    known = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(GOOD if known else BAD, "python", f"{version} at {sys.executable}")
    yield from (_installed(name) for name in ("trivium", *PACKAGES))
    missing = missing_packages()
    found = f"not installed: {', '.join(missing)}" if missing else "installed"
    yield Finding(NOTE if missing else GOOD, "export extra", found)


def _installed(name: str) -> Finding:
    try:
        return Finding(GOOD, name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(BAD, name, "not installed")


def check_providers(device: Device) -> Iterator[Finding]:
    """Whether the CPU and CUDA providers work. CUDA is optional unless `device` asks for it."""
    found = gpus()
    for gpu in found:
        yield Finding(GOOD, "GPU", gpu)
    if not found:
        yield Finding(NOTE, "GPU", "none reported by nvidia-smi")
    yield Finding(GOOD, "onnxruntime", providers.version())
    for provider, needed in ((providers.CPU, True), (providers.CUDA, device is Device.CUDA)):
        reason = providers.why_not(provider)
        verdict = GOOD if reason is None else BAD if needed else NOTE
        yield Finding(verdict, provider, reason or "works")


def check_host() -> Iterator[Finding]:
    """What this process may use of the host."""
    yield Finding(GOOD, "processor", str(cpu_limit()))
    yield Finding(GOOD, "memory", str(memory_limit()))


def check_ports(pipeline: Pipeline) -> Iterator[Finding]:
    """Whether `trivium up` could bind its default ports. A server already running is no fault."""
    try:
        pipeline.check_ports()
    except PortTaken as taken:
        yield Finding(NOTE, "ports", str(taken))
    else:
        yield Finding(GOOD, "ports", "the default ports are free")


def check_model(folder: Path) -> Iterator[Finding]:
    """Whether the model folder is complete."""
    try:
        model = load_model_directory(folder)
    except ModelDirectoryError as error:
        yield Finding(BAD, "model", str(error))
        return
    yield Finding(
        GOOD,
        "model",
        f"{model.id}, {model.family}, {model.precision or 'unknown'} weights, "
        f"context {model.context_length:,}, revision {model.revision}, at {model.path}",
    )


async def check_answer(pipeline: Pipeline, folder: Path) -> Finding:
    """Starts the three services on free ports and requests a few tokens, without TLS, keys or usage
    records."""
    for name in tuple(os.environ):
        if name.startswith("TRIVIUM_") and any(part in name for part in _UNSET_VARIABLES):
            del os.environ[name]
    try:
        async with Supervisor(pipeline.stages(), stop_seconds=30) as supervisor:
            await supervisor.wait_until_ready(300)
            text, usage = await _ask(pipeline.url, load_model_directory(folder))
    except (StageDied, NotReady, httpx.HTTPError) as error:
        return Finding(BAD, "smoke test", str(error) or type(error).__name__)
    if usage["completion_tokens"] != SMOKE_TOKENS:
        return Finding(BAD, "smoke test", f"asked for {SMOKE_TOKENS} tokens, got {usage}")
    return Finding(GOOD, "smoke test", f"{text!r} in {usage['gpu_seconds']:.3f} gpu_seconds")


async def _ask(url: str, model: ModelDirectory) -> tuple[str, dict[str, float]]:
    has_chat_template, prompt = model.has_chat_template, "Count from one to ten."
    body = {
        "model": model.id,
        **(
            {"messages": [{"role": "user", "content": prompt}]}
            if has_chat_template
            else {"prompt": prompt}
        ),
        "max_tokens": SMOKE_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        path = "chat/completions" if has_chat_template else "completions"
        response = await client.post(f"{url}/v1/{path}", json=body)
    response.raise_for_status()
    answer = response.json()
    choice = answer["choices"][0]
    return choice["message"]["content"] if has_chat_template else choice["text"], answer["usage"]


def doctor(
    model: Annotated[
        str,
        typer.Option(help="Model folder, or its name in ./models or the cache."),
    ] = EMBEDDED_MODEL,
    device: Annotated[
        Device, typer.Option(help="Device that the model must run on.")
    ] = Device.AUTO,
) -> None:
    """Checks the installation, the devices, the ports and the model, and generates five tokens."""
    found = [
        *_reported(check_installation()),
        *_reported(check_host()),
        *_reported(check_providers(device)),
    ]
    try:
        folder = _folder(model, device).absolute()
    except (OSError, RuntimeError) as error:  # it may not be read, or there is no home folder
        _reported(iter([Finding(BAD, "model", str(error))]))
        raise typer.Exit(FAILED) from error
    found += [
        *_reported(check_ports(Pipeline(folder))),
        *_reported(check_model(folder)),
    ]
    if all(finding.verdict != BAD for finding in found):
        smoke = check_answer(_on_free_ports(folder, device), folder)
        found += _reported(iter([asyncio.run(smoke)]))
    if any(finding.verdict == BAD for finding in found):
        raise typer.Exit(FAILED)


def _reported(findings: Iterator[Finding]) -> list[Finding]:
    """The same findings as a list, each printed as soon as it is known."""
    found = []
    colours = {GOOD: "green", NOTE: "yellow", BAD: "red"}
    for finding in findings:
        verdict = typer.style(f"{finding.verdict:<5}", fg=colours[finding.verdict])
        typer.echo(f"{verdict} {finding.subject:<22} {finding.text}")
        found.append(finding)
    return found


def _folder(model: str, device: Device) -> Path:
    """Where `trivium up` would find it."""
    if model != EMBEDDED_MODEL:
        possible = possible_folders(model)
        return next((folder for folder in possible if folder.is_dir()), possible[0])
    on_cuda = device is not Device.CPU and providers.why_not(providers.CUDA) is None
    return embedded_folder("cuda" if on_cuda else "cpu")


def _on_free_ports(folder: Path, device: Device) -> Pipeline:
    port, tokenizer, tokenizer_metrics, generator, generator_metrics = free_ports(5)
    return Pipeline(
        model=folder,
        device=device.value,
        port=port,
        tokenizer_port=tokenizer,
        tokenizer_metrics_port=tokenizer_metrics,
        generator_port=generator,
        generator_metrics_port=generator_metrics,
        drain_seconds=5,
    )
