"""API keys: a file of SHA-256 digests, compared in constant time, read again when it changes."""

import hashlib
import hmac
import logging
import os
import re
import time
from pathlib import Path

from trivium.wire.errors import ServiceError
from trivium.wire.telemetry import is_key_name

log = logging.getLogger(__name__)

_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s+(\S+).*)?")
_CHECK_SECONDS = 1.0


class KeyFileError(ValueError):
    """The key file cannot be read or has a line that is no digest."""


class KeyFile:
    """The accepted keys. A file that goes bad later leaves the last good keys in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked_at = time.monotonic()
        self._stamp = _stamp(path)
        self._keys = _read(path)

    def check(self, authorization: str) -> str:
        """The name of the key that the header's value bears; ServiceError unless it is accepted."""
        self._reload()
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ServiceError(
                "invalid_api_key",
                "You didn't provide an API key. Send it in an Authorization header: "
                "'Authorization: Bearer YOUR_KEY'.",
            )
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # All are compared, so that the time tells nothing of which one is near.
        matches = [name for known, name in self._keys if hmac.compare_digest(digest, known)]
        if not matches:
            raise ServiceError("invalid_api_key", "Incorrect API key provided.")
        return matches[0]

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = now
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._keys = _read(self._path)
            self._stamp = stamp
            log.info("%d API keys read from %s", len(self._keys), self._path)
        except KeyFileError as error:
            log.error("the API keys stay as they were: %s", error)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[tuple[bytes, str], ...]:
    """Digests and names."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path}: cannot be read: {error}") from None
    keys = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise KeyFileError(f"{path}: line {number} is not a SHA-256 digest in hex")
        digest = bytes.fromhex(match[1])
        name = match[2] if is_key_name(match[2] or "") else digest.hex()[:12]
        keys.append((digest, name))
    return tuple(keys)
