"""`trivium` itself, before any subcommand."""

import importlib.metadata

from typer.testing import CliRunner

from trivium.cli.main import app


def test_version_is_that_of_the_installed_package() -> None:
    """`trivium --version` prints one line and needs no subcommand."""
    result = CliRunner().invoke(app, ["--version"])

    assert (0, f"trivium {importlib.metadata.version('trivium')}\n") == (
        result.exit_code,
        result.output,
    )
