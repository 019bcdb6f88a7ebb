"""TLS for HTTP and gRPC servers."""

import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from trivium.wire.tls.files import Pem, TlsFiles
from trivium.wire.tls.pem import server_context


class ServerTls(TlsFiles):
    """A server's certificate and key. With `client_ca`, clients need a certificate signed by one of
    these CAs (mutual TLS). Raises TlsError.

    While `follow` runs, new connections use the files' current content. Existing ones stay open.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._client_ca = client_ca

        def check() -> None:
            context = server_context(certificate, key, client_ca)
            context.set_alpn_protocols(["http/1.1"])
            self._context = context

        super().__init__(certificate, key, client_ca, check)

    async def follow(self) -> None:
        """Reloads changed files, until cancelled."""
        async with contextlib.aclosing(self.renewals()) as renewals:
            async for _ in renewals:
                pass

    def http_context(self) -> ssl.SSLContext:
        """For an HTTP/1.1 server on asyncio."""
        context = _ReloadingContext(ssl.PROTOCOL_TLS_SERVER)
        context.current = lambda: self._context
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For one gRPC server."""
        given = self.pem

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """The new configuration, or None if nothing changed since the last call; gRPC calls it
            at each handshake, in its own threads."""
            nonlocal given
            pem = self.pem
            if pem is given:
                return None
            given = pem
            return _configuration(pem)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            renewed,  # type: ignore[arg-type]  # the stub omits None
            require_client_authentication=self._client_ca is not None,
        )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None, "A server without a key. This is a bug."
    assert pem.certificates is not None, "A server without a certificate. This is a bug."
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificates)], pem.ca)


class _ReloadingContext(ssl.SSLContext):
    """Creates each connection from the `current` context. CAs can be added to a context but not
    removed, so one context cannot be updated in place."""

    current: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self.current().wrap_bio(*arguments, **options)
