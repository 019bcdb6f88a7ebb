"""A file of API keys as SHA-256 digests, with names and limits, reloaded when it changes.

It is TOML, or one digest per line for keys without limits. Digests are compared in constant time.
"""

import hashlib
import hmac
import re
import time
import tomllib
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from trivium.keys.watched_file import WatchedFile
from trivium.wire.errors import ServiceError
from trivium.wire.telemetry import is_key_name

_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s+(\S+).*)?")
_TABLE = re.compile(r"^\s*\[", re.MULTILINE)

_Count = Annotated[StrictInt, Field(gt=0)]


class KeyFileError(ValueError):
    """The key file cannot be read or is invalid."""


class ApiKey(BaseModel):
    """A key, as described by its table in the file; None means no limit.

    `models` are model names as in requests. From `expires` on, in UTC unless it has an offset, the
    key is rejected. A `stage` key is for one of our own processes that calls the next stage: its
    calls name the key that they are charged to, and it has no limits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    models: tuple[str, ...] | None = None
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    concurrent_requests: _Count | None = None
    gpu_seconds_per_day: Annotated[StrictInt | StrictFloat, Field(gt=0)] | None = None
    expires: datetime | date | None = None
    stage: StrictBool = False

    @model_validator(mode="after")
    def _stages_have_no_limits(self) -> Self:
        limits = self.model_fields_set - {"name", "digest", "expires", "stage"}
        if self.stage and limits:
            raise ValueError(f"a stage key cannot have {sorted(limits)[0]}")
        return self

    @property
    def expires_at(self) -> float:
        """When the key expires, in seconds since 1970; infinity if it does not."""
        if self.expires is None:
            return float("inf")
        when = self.expires
        if not isinstance(when, datetime):
            when = datetime(when.year, when.month, when.day, tzinfo=UTC)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


class KeyFile:
    """The accepted keys. If the file becomes invalid, the last valid keys stay in use."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path, _read)

    def check(self, authorization: str) -> ApiKey:
        """The key in the value of an Authorization header; raises ServiceError unless accepted."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ServiceError(
                "invalid_api_key",
                "You didn't provide an API key. Send it in an Authorization header: "
                "'Authorization: Bearer YOUR_KEY'.",
            )
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # Compares with all keys, so that the time reveals nothing about them.
        matches = [key for known, key in self._file.content if hmac.compare_digest(digest, known)]
        if not matches:
            raise ServiceError("invalid_api_key", "Incorrect API key provided.")
        if time.time() >= matches[0].expires_at:
            raise ServiceError("invalid_api_key", "This API key has expired.")
        return matches[0]


def _read(path: Path) -> tuple[tuple[bytes, ApiKey], ...]:
    """All keys, each with its digest."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path}: cannot be read: {error}") from None
    read = _from_toml if _TABLE.search(text) else _from_lines
    keys: dict[bytes, ApiKey] = {}
    for key in read(text, path):
        digest = bytes.fromhex(key.digest)
        if digest in keys and read is _from_toml:
            names = f"{keys[digest].name} and {key.name}"
            raise KeyFileError(f"{path}: {names} have the same digest")
        keys.setdefault(digest, key)
    return tuple(keys.items())


def _from_lines(text: str, path: Path) -> Iterator[ApiKey]:
    """One digest per line, then optionally a name; by default the start of the digest."""
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise KeyFileError(f"{path}: line {number} is not a SHA-256 digest in hex")
        digest = match[1].lower()
        name = match[2] if is_key_name(match[2] or "") else digest[:12]
        yield ApiKey(name=name, digest=digest)


def _from_toml(text: str, path: Path) -> Iterator[ApiKey]:
    """One table per key: [keys.NAME]."""
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise KeyFileError(f"{path}: {error}") from None
    unknown = sorted(document.keys() - {"keys"})
    tables = document.get("keys", {})
    if unknown or not isinstance(tables, dict):
        found = unknown[0] if unknown else "keys"
        raise KeyFileError(f"{path}: expected tables [keys.NAME], not {found}")
    for name, table in tables.items():
        where = f"{path}: keys.{name}"
        if not is_key_name(name):
            raise KeyFileError(
                f"{where}: a key's name has 1 to 64 characters: letters, digits and . _ : / + = @ -"
            )
        if not isinstance(table, dict) or "name" in table:
            raise KeyFileError(f"{where}: expected a table [keys.{name}] without a name in it")
        try:
            yield ApiKey(name=name, **table)
        except ValidationError as error:
            fault = error.errors(include_input=False)[0]
            field = "".join(f".{part}" for part in fault["loc"][:1])
            raise KeyFileError(f"{where}{field}: {fault['msg']}") from None
