"""The `trivium` command, assembled from one file per subcommand."""

import importlib.metadata
from typing import Annotated

import typer

from trivium.cli.bench import bench
from trivium.cli.chat import chat
from trivium.cli.doctor import doctor
from trivium.cli.export import PASS_ALL, export
from trivium.cli.up import up
from trivium.cli.usage import usage

app = typer.Typer(
    help="Chat completions from three gRPC services on ONNX Runtime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"trivium {importlib.metadata.version('trivium')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself, given before any subcommand."""


app.command()(up)
app.command(context_settings=PASS_ALL)(export)
for command in (chat, bench, usage, doctor):
    app.command()(command)
