"""The `trivium` command: one file per subcommand, put together here."""

import typer

from trivium.cli.bench import bench
from trivium.cli.chat import chat
from trivium.cli.doctor import doctor
from trivium.cli.export import export
from trivium.cli.up import up

app = typer.Typer(
    help="Chat completions from three gRPC services on ONNX Runtime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (up, export, chat, bench, doctor):
    app.command()(command)
