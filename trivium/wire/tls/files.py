"""The TLS files of a server or client, checked every second and reloaded when they change."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trivium.wire.tls.pem import TlsError, expiry, read_file

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class Pem:
    """The files' contents: our certificate chain, its key, and the trusted CAs."""

    certificates: bytes | None
    key: bytes | None
    ca: bytes | None


class TlsFiles:
    """TLS files; `pem` is their latest valid content.

    `check` raises TlsError if the files are invalid now; so does TlsFiles when it is created.
    """

    def __init__(
        self,
        certificate: Path | None,
        key: Path | None,
        ca: Path | None,
        check: Callable[[], None],
    ) -> None:
        self._paths = (certificate, key, ca)
        self._check = check
        self._failures = 0
        self._expired: Pem | None = None  # the one whose expiry was logged
        self._checked_at = time.monotonic()
        check()
        self.pem = self._read()

    @property
    def certificate(self) -> Path | None:
        """The file of our own certificate."""
        return self._paths[0]

    @property
    def expires_at(self) -> datetime | None:
        """When our certificate in use expires; None without one."""
        return None if self.pem.certificates is None else expiry(self.pem.certificates)

    async def renewals(self) -> AsyncGenerator[None]:
        """Yields whenever `pem` has changed, forever. May be iterated several times at once."""
        known = self.pem
        while True:
            self._reload()
            self._warn_if_expired()
            if self.pem is not known:
                known = self.pem
                yield
            await asyncio.sleep(CHECK_SECONDS)

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < CHECK_SECONDS / 2:  # another iterator just did
            return
        self._checked_at = now
        try:
            pem = self._read()
            if pem != self.pem:
                self._check()
                if pem != self._read():
                    return  # still being replaced
                self.pem = pem
                log.info("reloaded TLS files: %s", self._names())
            self._failures = 0
        except TlsError as error:
            # When files are replaced one after the other, they briefly do not match.
            self._failures += 1
            if self._failures == 2:
                log.error(
                    "TLS reload failed, the previous content of %s stays in use: %s",
                    self._names(),
                    error,
                )

    def _read(self) -> Pem:
        return Pem(*(None if path is None else read_file(path) for path in self._paths))

    def _names(self) -> str:
        return ", ".join(str(path) for path in self._paths if path is not None)

    def _warn_if_expired(self) -> None:
        expires_at = self.expires_at
        if expires_at is None or self._expired is self.pem:
            return
        if expires_at <= datetime.now(UTC):
            self._expired = self.pem
            log.warning("the certificate in %s expired at %s", self.certificate, expires_at)
