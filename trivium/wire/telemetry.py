"""What every hop knows about a call: request id, W3C traceparent, key name. And the logs.

Independent of who calls whom.
"""

import contextvars
import json
import logging
import math
import re
import sys
import time
import uuid
from collections.abc import Iterable
from typing import Any

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
KEY_NAME = "x-trivium-key-name"  # never accepted over HTTP: the facade looks it up by the key

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_SANE_KEY_NAME = re.compile(r"[A-Za-z0-9._:/+=@-]{1,64}")
_SANE_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
# They end a line somewhere, or change what a terminal shows of it.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
traceparent: contextvars.ContextVar[str] = contextvars.ContextVar("traceparent", default="")
key_name: contextvars.ContextVar[str] = contextvars.ContextVar("key_name", default="")
# A caller that hangs up after this monotonic time is taken to have reached its deadline.
deadline_at: contextvars.ContextVar[float] = contextvars.ContextVar("deadline_at", default=math.inf)


def trace_id() -> str:
    """The current call's trace id, 32 hexadecimal digits; empty without a trace."""
    return traceparent.get()[3:35]


def is_key_name(text: str) -> bool:
    """Whether this is a valid key name: 1 to 64 letters, digits or . _ : / + = @ -"""
    return _SANE_KEY_NAME.fullmatch(text) is not None


def adopt(headers: Iterable[tuple[str, str | bytes]]) -> str:
    """Sets the context variables from a call's headers; returns its request id.

    A request id that is missing, too long or has invalid characters is replaced by a new one.
    """
    known = {name.lower(): value for name, value in headers if isinstance(value, str)}
    received = known.get(REQUEST_ID, "")
    adopted = received if _SANE_REQUEST_ID.fullmatch(received) else f"req_{uuid.uuid4().hex}"
    request_id.set(adopted)
    parent = known.get(TRACEPARENT, "")
    traceparent.set(parent if _SANE_TRACEPARENT.fullmatch(parent) else "")
    name = known.get(KEY_NAME, "")
    key_name.set(name if is_key_name(name) else "")
    return adopted


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """gRPC metadata that carries the current call's identity to the next stage."""
    metadata = [(REQUEST_ID, request_id.get())]
    if traceparent.get():
        metadata.append((TRACEPARENT, traceparent.get()))
    if key_name.get():
        metadata.append((KEY_NAME, key_name.get()))
    return tuple(metadata)


class _Formatter(logging.Formatter):
    """Formats a record as JSON: service, request and trace ids, message, and its `fields`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = self._identity(record) | {"message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)

    def _identity(self, record: logging.LogRecord) -> dict[str, Any]:
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "request_id": request_id.get(),
            "trace_id": trace_id() or "-",
        }


class _TextFormatter(_Formatter):
    """The human-readable format: one line per record, apart from exceptions."""

    def format(self, record: logging.LogRecord) -> str:
        known = self._identity(record)
        line = f"{known['time']} {known['level'].upper():<7} {known['service']}: "
        line += _CONTROL.sub(lambda found: repr(found[0])[1:-1], record.getMessage())
        line += "".join(
            f" {name}={known[name]}" for name in ("request_id", "trace_id") if known[name] != "-"
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


_FORMATTERS = {"json": _Formatter, "text": _TextFormatter}


def configure_logging(service: str, level: str = "info", format: str = "json") -> None:
    """Logs to standard error: `json` objects, or `text`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FORMATTERS[format](service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
