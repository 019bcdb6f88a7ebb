"""TLS settings, the same in all services: names, descriptions and checks.

A server's settings begin with TLS_, a channel's with the name of the stage it calls.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_settings import BaseSettings

from trivium.wire.tls.channel import ChannelTls
from trivium.wire.tls.pem import check_certificates, server_context
from trivium.wire.tls.server import ServerTls

CA_FILE = (
    "CA certificates (PEM file). If set, calls use TLS, and the server's certificate must be "
    "signed by one of these CAs. TLS files are reloaded when they change."
)
CERT_FILE = "Client certificate (PEM file), for servers that ask for one (mutual TLS)."
KEY_FILE = "Its private key (PEM file, without a passphrase)."
SERVER_NAME = (
    "Name to verify the server's certificate against, also sent as :authority. Not set: the "
    "host name or IP address in the target."
)


# The setting that each one requires.
_NEEDS = {
    "key_file": "cert_file",
    "client_ca_file": "cert_file",
    "cert_file": "ca_file",  # for channels; servers have no ca_file
    "server_name": "ca_file",
}


def _check(value: Path | str | None, info: ValidationInfo) -> Path | str | None:
    """Checks a setting against those declared before it. An invalid one is missing from `info.data`
    and is reported on its own."""
    prefix, _, kind = (info.field_name or "").rpartition("tls_")
    prefix += "tls_"
    others = {name.removeprefix(prefix): other for name, other in info.data.items()}
    certificate, needed = others.get("cert_file"), _NEEDS.get(kind)
    if value is None:
        if kind == "key_file" and certificate is not None:
            raise ValueError(f"required with {prefix.upper()}CERT_FILE")
    elif needed in others and others[needed] is None:
        raise ValueError(f"requires {prefix.upper()}{needed.upper()}")
    elif kind == "key_file" and certificate is not None:
        server_context(certificate, Path(value))
    elif kind in ("ca_file", "client_ca_file", "cert_file"):
        check_certificates(Path(value))
    return value


TlsFile = Annotated[Path | None, AfterValidator(_check)]
TlsServerName = Annotated[str | None, AfterValidator(_check)]


class ServerTlsSettings(BaseSettings):
    """TLS settings of a service's port, not of its metrics."""

    tls_cert_file: TlsFile = Field(
        None,
        description="Server certificate (PEM file), followed by its intermediate CAs. If set, "
        "PORT accepts TLS only. Reloaded when it changes, as are the next two.",
    )
    tls_key_file: TlsFile = Field(None, validate_default=True, description=KEY_FILE)
    tls_client_ca_file: TlsFile = Field(
        None,
        description="CA certificates (PEM file). If set, clients need a certificate signed by "
        "one of these CAs (mutual TLS).",
    )

    @property
    def authenticates_clients_by_tls(self) -> bool:
        """Whether clients must present a certificate."""
        return self.tls_client_ca_file is not None

    def server_tls(self) -> ServerTls | None:
        """None without a certificate. Raises TlsError."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return ServerTls(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)


def channel_tls(
    ca_file: Path | None, cert_file: Path | None, key_file: Path | None, server_name: str | None
) -> ChannelTls | None:
    """None without CAs. Raises TlsError."""
    if ca_file is None:
        return None
    return ChannelTls(ca_file, cert_file, key_file, server_name)
