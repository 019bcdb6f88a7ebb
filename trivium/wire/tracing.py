"""OpenTelemetry spans of a call: one trace spans all stages.

Without an OTLP endpoint in the environment nothing is imported or recorded, and a span costs a
microsecond. The current span is the parent of spans begun inside it, and of the next stage's.
"""

import contextlib
import contextvars
import os
import time
from collections.abc import Callable, Iterator

from trivium.wire import telemetry
from trivium.wire.errors import CLIENT_LEFT, ERRORS, code_of
from trivium.wire.settings import refuse_to_start
from trivium.wire.span import Attributes, Span

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


# Begins a span: its name, its parent's traceparent or "", whether the parent is in another process,
# its attributes, and its start by the monotonic clock.
Begin = Callable[[str, str, bool, Attributes, float], Span]

_NONE = Span()
_begin: Begin | None = None
_current: contextvars.ContextVar[Span] = contextvars.ContextVar("span", default=_NONE)


@contextlib.contextmanager
def export_spans(service: str, instance: str) -> Iterator[None]:
    """Records this service's spans inside the block, if an endpoint is configured.

    Flushes them at the end. Exits with status 2 if OpenTelemetry is missing or misconfigured.
    """
    global _begin
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        yield
        return
    try:
        from trivium.wire import otlp

        exporter = otlp.Exporter(service, instance)
    except ModuleNotFoundError as error:
        refuse_to_start(f"{endpoint} is set, which requires 'trivium[otel]' ({error})")
    except ValueError as error:
        refuse_to_start(str(error))
    _begin = exporter.begin
    try:
        yield
    finally:
        _begin = None
        exporter.close()


def current() -> Span:
    """This context's current span; an unrecorded one if there is none."""
    return _current.get()


@contextlib.contextmanager
def call(name: str, attributes: Attributes, begins: bool) -> Iterator[Span]:
    """A span around a call that this process received, in the caller's trace.

    If the caller sent no trace, it starts a new one if `begins`, else it is not recorded.
    """
    parent = telemetry.traceparent.get()
    if _begin is None or not (parent or begins):
        yield _NONE
        return
    with _running(_begin(name, parent, True, attributes, time.monotonic())) as span:
        yield span


@contextlib.contextmanager
def span(name: str) -> Iterator[Span]:
    """A child of the current span."""
    parent = _current.get()
    if _begin is None or not parent.is_recording:
        yield _NONE
        return
    with _running(_begin(name, parent.traceparent, False, {}, time.monotonic())) as found:
        yield found


def record(name: str, begin: float, end: float, attributes: Attributes | None = None) -> None:
    """Records a child of the current span, between two times of the monotonic clock."""
    parent = _current.get()
    if _begin is not None and parent.is_recording:
        _begin(name, parent.traceparent, False, attributes or {}, begin).end(end)


@contextlib.contextmanager
def _running(span: Span) -> Iterator[Span]:
    # Restored by hand: a generator closed from another task cannot use a token.
    outer, parent = _current.get(), telemetry.traceparent.get()
    _current.set(span)
    if span.traceparent:
        telemetry.traceparent.set(span.traceparent)
    try:
        yield span
    except BaseException as error:
        code = code_of(error)
        span.set({"error.type": code})
        if code != CLIENT_LEFT and ERRORS[code].http >= 500:
            span.fail(code)
        raise
    finally:
        span.end()
        _current.set(outer)
        telemetry.traceparent.set(parent)
