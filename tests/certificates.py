"""Certificates and CAs as files, as operators have them."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

LOOPBACK_NAMES = ("localhost", "127.0.0.1")
YESTERDAY = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(days=1)


@dataclass(frozen=True)
class Files:
    """One side's certificate, its key, and the CA that it trusts; each can be replaced in place."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "tls.crt"

    @property
    def key(self) -> Path:
        return self.folder / "tls.key"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    def write(
        self,
        signer: trustme.CA,
        trusted: trustme.CA | None = None,
        names: tuple[str, ...] = LOOPBACK_NAMES,
        **dates: Any,
    ) -> "Files":
        """A new certificate by `signer`, which is also the trusted CA unless `trusted` is given."""
        self.folder.mkdir(exist_ok=True)
        made = signer.issue_cert(*names, **dates)
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        self.key.write_bytes(made.private_key_pem.bytes())
        self.ca.write_bytes((trusted or signer).cert_pem.bytes())
        return self

    def server(self, prefix: str, is_mutual: bool = False) -> dict[str, str]:
        """Settings of a server with these files; `prefix` is like TRIVIUM_FACADE_."""
        settings = {
            f"{prefix}TLS_CERT_FILE": str(self.certificate),
            f"{prefix}TLS_KEY_FILE": str(self.key),
        }
        return settings | ({f"{prefix}TLS_CLIENT_CA_FILE": str(self.ca)} if is_mutual else {})

    def channel(self, prefix: str) -> dict[str, str]:
        """Settings of a client with these files; `prefix` is like TRIVIUM_FACADE_TOKENIZER_."""
        return {
            f"{prefix}TLS_CA_FILE": str(self.ca),
            f"{prefix}TLS_CERT_FILE": str(self.certificate),
            f"{prefix}TLS_KEY_FILE": str(self.key),
        }
