"""`trivium export`: replaces itself by the exporter's process, with the same arguments."""

import os
import sys

import typer

# All arguments go to the exporter, `--help` too.
PASS_ALL = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def export(context: typer.Context) -> None:
    """Makes a model folder from a checkpoint."""
    command = (sys.executable, "-m", "generator_svc.export", *context.args)
    os.execv(sys.executable, command)
