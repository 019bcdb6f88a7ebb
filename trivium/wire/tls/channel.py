"""TLS of channels to the next stage."""

from pathlib import Path

import grpc

from trivium.wire.tls.files import TlsFiles
from trivium.wire.tls.pem import check_certificates, server_context


class ChannelTls(TlsFiles):
    """The CAs that servers are checked against; certificate and key for those that ask for one.

    Servers have to prove that they are `server_name`, instead of the name, or the IP address, by
    which they are called. Raises TlsError.
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
                server_context(certificate, key)  # fits a client as well

        super().__init__(certificate, key, ca, check)

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel that is opened now."""
        pem = self.pem
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificates)
