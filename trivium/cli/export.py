"""`trivium export`: a checkpoint becomes a model folder, with a progress bar."""

from __future__ import annotations

import importlib.util
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from generator_svc.export import ExportError, ExportOptions, export_model
from trivium.cache_folder import cache_folder
from trivium.cli.embedded import embedded_folder

NEEDED = ("torch", "transformers", "optimum", "onnx", "gguf")
FAILED, REFUSED = 1, 2


class Precision(StrEnum):
    """How weights and activations are stored; w8a8 multiplies them as 8-bit integers."""

    INT8 = "int8"
    INT4 = "int4"
    W8A8 = "w8a8"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(StrEnum):
    """What the graph is made for."""

    CPU = "cpu"
    CUDA = "cuda"


def missing_packages() -> list[str]:
    """The packages of the export extra that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def how_to_install(missing: list[str]) -> str:
    """What to type when the export extra is not there."""
    return (
        f"The export needs packages that are not installed: {', '.join(missing)}.\n"
        f"Install them with: {sys.executable} -m pip install 'trivium[export]'\n"
        f"or, in a checkout: {sys.executable} -m pip install -e '.[export]'"
    )


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a .gguf file, a model of the Hugging Face Hub "
            "(owner/name, owner/name@revision, owner/name:file.gguf; HF_TOKEN and HF_ENDPOINT are "
            "heeded), or the embedded default smollm2-135m-instruct."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make; its name is the model's id.")],
    precision: Annotated[
        Precision, typer.Option(help="Of weights (and activations: w8a8).")
    ] = Precision.INT8,
    device: Annotated[Device, typer.Option(help="What the graph is made for.")] = Device.CPU,
    force: Annotated[bool, typer.Option(help="Replace a folder that is there already.")] = False,
) -> None:
    """Makes a model folder from a checkpoint."""
    console = Console(stderr=True)
    missing = missing_packages()
    if missing:
        console.print(how_to_install(missing), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSED)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        options = ExportOptions(precision=precision.value, device=device.value)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("starting", total=1.0)

            def show(step: str, done: float) -> None:
                progress.update(task, description=step, completed=done)

            export_model(source, out, options, show, force=force, cache=cache_folder())
    except ExportError as error:
        console.print(f"trivium export: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED) from error
    if out.absolute() != embedded_folder():  # `trivium up` goes on by itself
        console.print(f"{out} is ready: trivium up --model {out}", markup=False, soft_wrap=True)
