"""Usage records: who used what, one JSON line for each request, on standard output or in a file.

Where a request's device time is settled its record is written: in the generator. The facade writes
those of requests that ended before an answer began. docs/usage.md describes the fields.
"""

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

EVENT = "usage"  # tells records from the log lines that they may be collected with
STANDARD_OUTPUT = "-"

# Of each setting, in all services that write records.
USAGE_LOG = (
    "Where usage records are written, one JSON line for each request: a folder, in which they go "
    "to LOG_NAME.usage.jsonl, or `-` for standard output. Without it none are written."
)
USAGE_LOG_MAX_BYTES = (
    "Size at which that file becomes LOG_NAME.usage.jsonl.1, and that one .2, and so on."
)
USAGE_LOG_BACKUPS = "How many of these are kept; records beyond them are lost."


@dataclass(frozen=True)
class UsageRecord:
    """What a request took. Times are in seconds, `time` since 1970, when it ended.

    `key` is empty if no key was asked for, `trace_id` without a trace. None is what is not known:
    what became of a text whose reader left, a first token that never came.
    """

    service: str
    request_id: str
    trace_id: str
    key: str
    model: str
    status: int
    finish_reason: str
    duration_seconds: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None
    device_nanoseconds: int = 0
    queue_seconds: float | None = None
    ttft_seconds: float | None = None
    time: float = field(default_factory=time.time)

    def line(self) -> str:
        """The record as one line of JSON."""
        fields: dict[str, Any] = {"event": EVENT, "time": _rfc3339(self.time)}
        for name, value in asdict(self).items():
            if name == "time":
                continue
            if name == "device_nanoseconds":
                fields["gpu_seconds"] = value / 1e9
            fields[name] = round(value, 6) if name.endswith("_seconds") and value else value
        return json.dumps(fields)


def _rfc3339(seconds: float) -> str:
    milliseconds = int(seconds * 1000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{text}.{milliseconds % 1000:03d}Z"


class UsageLog:
    """Writes records. Each is with the operating system once `write` returns, so that it outlives
    the process."""

    def __init__(self, target: str | None, name: str, max_bytes: int, backups: int) -> None:
        """`target` and the others are as the settings say; raises OSError for a folder that cannot
        be written to."""
        self._handler = _handler(target, name, max_bytes, backups)

    def write(self, record: UsageRecord) -> None:
        """Appends one record."""
        if self._handler is not None:
            self._handler.handle(logging.makeLogRecord({"msg": record.line()}))

    def close(self) -> None:
        """Closes the file."""
        if self._handler is not None:
            self._handler.close()


def _handler(target: str | None, name: str, max_bytes: int, backups: int) -> logging.Handler | None:
    if target is None:
        return None
    if target == STANDARD_OUTPUT:
        return logging.StreamHandler(sys.stdout)
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    return RotatingFileHandler(
        folder / f"{name}.usage.jsonl", maxBytes=max_bytes, backupCount=backups, encoding="utf-8"
    )
