"""Spans of a call, for OpenTelemetry: one trace goes through all stages.

Without OTEL_EXPORTER_OTLP_ENDPOINT nothing is imported and nothing recorded, and a span costs a
microsecond. A span that runs is the parent of those that begin meanwhile, and of the next stage's.
"""

import contextlib
import contextvars
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from trivium.wire import telemetry
from trivium.wire.errors import CLIENT_LEFT, ERRORS, code_of
from trivium.wire.settings import refuse_to_start

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Span:
    """One that is not recorded. `traceparent` is empty where there is no trace to go on with."""

    is_recording = False
    traceparent = ""

    def rename(self, name: str) -> None:
        """Calls it otherwise than it was called when it began."""

    def set(self, attributes: Attributes) -> None:
        """Adds attributes."""

    def event(
        self, name: str, at: float | None = None, attributes: Attributes | None = None
    ) -> None:
        """Notes what happened at this time of the monotonic clock, or happens now."""

    def fail(self, description: str) -> None:
        """It did not do what it was for."""

    def end(self, at: float | None = None) -> None:
        """It ends, at this time of the monotonic clock, or now."""


# Begins a span: its name, the traceparent of its parent or "", whether that is in another process,
# its attributes, and when it began by the monotonic clock.
Begin = Callable[[str, str, bool, Attributes, float], Span]

_NONE = Span()
_begin: Begin | None = None
_current: contextvars.ContextVar[Span] = contextvars.ContextVar("span", default=_NONE)


@contextlib.contextmanager
def exported(service: str, instance: str) -> Iterator[None]:
    """Records spans of this service while inside, if there is somewhere to send them.

    Sends what is left at the end. Ends the process with status 2 if OpenTelemetry is not installed.
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
        refuse_to_start(f"{endpoint} is set: install 'trivium[otel]' ({error})")
    except ValueError as error:
        refuse_to_start(str(error))
    _begin = exporter.begin
    try:
        yield
    finally:
        _begin = None
        exporter.close()


def current() -> Span:
    """The span that runs in this context; one that is not recorded if none does."""
    return _current.get()


@contextlib.contextmanager
def call(name: str, attributes: Attributes, begins: bool) -> Iterator[Span]:
    """A span around a call that came to this process: it goes on with the caller's trace.

    Without one it `begins` a trace, or is not recorded.
    """
    parent = telemetry.traceparent.get()
    if _begin is None or not (parent or begins):
        yield _NONE
        return
    with _running(_begin(name, parent, True, attributes, time.monotonic())) as span:
        yield span


@contextlib.contextmanager
def span(name: str) -> Iterator[Span]:
    """A span around a part of what the current one is around."""
    parent = _current.get()
    if _begin is None or not parent.is_recording:
        yield _NONE
        return
    with _running(_begin(name, parent.traceparent, False, {}, time.monotonic())) as found:
        yield found


def record(name: str, begin: float, end: float, attributes: Attributes | None = None) -> None:
    """A part of what the current span is around, between two times of the monotonic clock."""
    parent = _current.get()
    if _begin is not None and parent.is_recording:
        _begin(name, parent.traceparent, False, attributes or {}, begin).end(end)


@contextlib.contextmanager
def _running(span: Span) -> Iterator[Span]:
    # Put back by hand: a generator that is closed from another task may not use a token.
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
