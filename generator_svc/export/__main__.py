"""`python -m generator_svc.export`, which `trivium export` executes: progress bar and outcome."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from generator_svc.export import ExportError, ExportOptions, export_model
from generator_svc.export.progress import Progress
from generator_svc.export.progress_bar import Steps
from trivium.cache_folder import cache_folder
from trivium.export_extra import missing_packages
from trivium.model_directory import CHAT_TEMPLATE, TOKENIZER_CONFIG

FAILED, REFUSED, INTERRUPTED = 1, 2, 130

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


class Precision(StrEnum):
    """How weights are stored; w8a8 also quantises activations and multiplies 8-bit integers."""

    INT8 = "int8"
    INT4 = "int4"
    W8A8 = "w8a8"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(StrEnum):
    """The device that the graph is made for."""

    CPU = "cpu"
    CUDA = "cuda"


def how_to_install(missing: list[str]) -> str:
    """How to install the export extra if packages are missing."""
    return (
        f"The export needs packages that are not installed: {', '.join(missing)}.\n"
        f"Install them with: {sys.executable} -m pip install 'trivium[export]'\n"
        f"or, in a checkout: {sys.executable} -m pip install -e '.[export]'"
    )


def until_interrupted(progress: Progress) -> Progress:
    """Wraps `progress` so that it ends the export after Ctrl-C, wherever that was received.

    Some libraries swallow all exceptions while they are imported, KeyboardInterrupt included.
    """
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def show(step: str, done: int = 0, total: int | None = None) -> None:
        if received:
            raise KeyboardInterrupt
        progress(step, done, total)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as by nohup
        signal.signal(signal.SIGINT, interrupt)
    return show


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a .gguf file, a model of the Hugging Face Hub "
            "(owner/name, owner/name@revision, owner/name:file.gguf; HF_TOKEN and HF_ENDPOINT "
            "apply), or the embedded default smollm2-135m-instruct."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create. Its name becomes the model id.")],
    precision: Annotated[
        Precision, typer.Option(help="Precision of the weights; w8a8 also quantises activations.")
    ] = Precision.INT8,
    device: Annotated[Device, typer.Option(help="Device that will run the model.")] = Device.CPU,
    force: Annotated[
        bool, typer.Option(help="Replace an existing export with other options or another source.")
    ] = False,
) -> None:
    """Exports a checkpoint to a model folder."""
    # A console of its own, as some steps redirect sys.stderr to silence libraries.
    console = Console(file=sys.stderr)
    missing = missing_packages()
    if missing:
        console.print(how_to_install(missing), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSED)
    try:
        options = ExportOptions(precision=precision.value, device=device.value)
        with Steps(console) as steps:
            show = until_interrupted(steps.show)
            export_model(source, out, options, show, force=force)
    except ExportError as error:
        console.print(f"trivium export: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        message = f"trivium export: interrupted; {out} is unchanged"
        console.print(message, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    # Exports into the cache are made by `trivium up`, which goes on to serve them.
    with contextlib.suppress(RuntimeError):  # without a home folder, there is no cache
        if cache_folder() in out.absolute().parents:
            return
    console.print(f"{out} {_what_next(out)}", markup=False, soft_wrap=True)


def _what_next(folder: Path) -> str:
    command = f"trivium up --model {shlex.quote(str(folder))}"
    config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    if (folder / CHAT_TEMPLATE).is_file() or config.get("chat_template"):
        return f"is ready: {command}"
    return f"is ready for plain completions (chat needs a {CHAT_TEMPLATE} in it): {command}"


if __name__ == "__main__":
    app(prog_name="trivium export")
