"""Usage records: who used what, one JSON line per request, on standard output or in a file.

The generator writes a request's record, once its device time is settled. The facade writes those
of requests that ended before an answer began. docs/usage.md describes the fields.
"""

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from prometheus_client import Counter
from prometheus_client.registry import CollectorRegistry

from trivium.line_file import LineFile, RotatedLineFile

log = logging.getLogger(__name__)

EVENT = "usage"  # tells records apart from log lines collected with them
STANDARD_OUTPUT = "-"

# Descriptions of the settings, for all services that write records.
USAGE_LOG = (
    "Destination of usage records, one JSON line per request: a folder, for the file "
    "LOG_NAME.usage.jsonl in it, or `-` for standard output. Not set: no records are "
    "written."
)
USAGE_LOG_MAX_BYTES = (
    "Size in bytes at which the file is rotated to LOG_NAME.usage.jsonl.1, that one to .2, "
    "and so on."
)
USAGE_LOG_BACKUPS = "Number of rotated files to keep; older ones are deleted."


@dataclass(frozen=True)
class UsageRecord:
    """What a request used. Times are in seconds; `time` is when it ended, since 1970.

    `key` is empty if no API key was required, `trace_id` without a trace. None means unknown: the
    reasoning tokens of an answer whose client left, the TTFT without a first token.
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
    """Writes records. The operating system has each one once `write` returns, so it survives the
    process."""

    def __init__(
        self,
        target: str | None,
        name: str,
        max_bytes: int,
        backups: int,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """`target`, `max_bytes` and `backups` are as in the settings; `registry` gets the count of
        lost records. Raises OSError if the folder is not writable, or another process is writing
        the file."""
        self._file = _opened(target, name, max_bytes, backups)
        self._is_failing = False
        self._lost = Counter(
            "trivium_usage_records_lost",
            "Usage records that could not be written, for example to a full disk; the log says why",
            registry=registry,
        )

    def write(self, record: UsageRecord) -> None:
        """Appends one record. One that cannot be written is lost, without affecting requests."""
        if self._file is None:
            return
        try:
            self._file.write(record.line().encode() + b"\n")
        except OSError as error:
            self._lost.inc()
            if not self._is_failing:  # one line per record would fill the disk
                log.error(
                    "usage records are being lost, cannot write to %s: %s",
                    self._file.name,
                    error.strerror,
                )
            self._is_failing = True
        else:
            self._is_failing = False

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _opened(target: str | None, name: str, max_bytes: int, backups: int) -> LineFile | None:
    if target is None:
        return None
    if target == STANDARD_OUTPUT:
        # Unbuffered: Python would retry writing buffered bytes at exit.
        return LineFile(FileIO(sys.stdout.fileno(), "w", closefd=False), "standard output")
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    return RotatedLineFile(folder / f"{name}.usage.jsonl", max_bytes, backups)
