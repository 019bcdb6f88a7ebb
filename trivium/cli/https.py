"""Which servers a client of the command line trusts."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

import httpx
import typer

CaFileOption = Annotated[
    Path | None,
    typer.Option(
        envvar="SSL_CERT_FILE",
        help="CA certificates (PEM) for https:// addresses. Default: those of certifi.",
    ),
]


def trusted(ca_file: Path | None) -> ssl.SSLContext:
    """A context that checks servers against these CAs; exits with 2 if the file holds none."""
    if ca_file is None:
        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # SSLError is one
        typer.echo(f"--ca-file {ca_file}: {error.strerror or error}", err=True)
        raise typer.Exit(2) from error
