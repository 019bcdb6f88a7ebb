"""TLS for channels to the next stage."""

from pathlib import Path

import grpc

from trivium.wire.tls.files import TlsFiles
from trivium.wire.tls.pem import check_certificates, server_context


class ChannelTls(TlsFiles):
    """The CAs that verify servers, and the certificate and key for servers that ask for one.

    Servers' certificates must match `server_name`, if given, instead of the name or IP address in
    the target. Raises TlsError.
    """

    def __init__(
        self,
        ca: Path,
        certificate: Path | None = None,
        key: Path | None = None,
        server_name: str | None = None,
    ) -> None:
        self.server_name = server_name

        def check() -> None:
            check_certificates(ca)
            if certificate is not None and key is not None:
                server_context(certificate, key)  # works for a client as well

        super().__init__(certificate, key, ca, check)

    def credentials(self) -> grpc.ChannelCredentials:
        """The current credentials, for a new channel."""
        pem = self.pem
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificates)
