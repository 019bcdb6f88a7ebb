"""TLS options of command-line clients: trusted CAs and client certificate."""

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
        help="CA certificates (PEM) for https:// URLs. Default: certifi's.",
    ),
]
CertFileOption = Annotated[
    Path | None,
    typer.Option(
        help="Client certificate (PEM) for servers that ask for one; may contain its key too."
    ),
]
KeyFileOption = Annotated[Path | None, typer.Option(help="Private key (PEM) of --cert-file.")]


def tls_context(
    ca_file: Path | None, cert_file: Path | None = None, key_file: Path | None = None
) -> ssl.SSLContext:
    """A context that verifies servers against these CAs, and presents the certificate.

    Exits with 2 if a file is invalid.
    """
    if ca_file is None:
        context = httpx.create_ssl_context(trust_env=False)
    else:
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as error:  # SSLError is one
            raise _refused(f"--ca-file {ca_file}", error) from error
    if cert_file is not None:
        try:
            context.load_cert_chain(cert_file, key_file)
        except OSError as error:
            key = "" if key_file is None else f" with --key-file {key_file}"
            raise _refused(f"--cert-file {cert_file}{key}", error) from error
    elif key_file is not None:
        typer.echo(f"--key-file {key_file} requires --cert-file", err=True)
        raise typer.Exit(2)
    return context


def _refused(option: str, error: OSError) -> typer.Exit:
    typer.echo(f"{option}: {error.strerror or error}", err=True)
    return typer.Exit(2)
