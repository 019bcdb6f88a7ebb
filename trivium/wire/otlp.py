"""Creates spans with OpenTelemetry's SDK and sends them to a collector (OTLP).

The SDK reads its own environment variables: OTEL_EXPORTER_OTLP_…, OTEL_TRACES_SAMPLER, OTEL_BSP_…,
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_SDK_DISABLED. Only this module imports
OpenTelemetry.
"""

import importlib.metadata
import os
import threading
import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from trivium.wire.span import Attributes, Span

_CLOSE_SECONDS = 3.0  # to flush the remaining spans; a dead collector must not delay the exit


class Exporter:
    """Creates and sends the spans of one instance of a service.

    Raises ValueError for an unknown protocol.
    """

    def __init__(self, service: str, instance: str) -> None:
        resource = Resource.create(
            {
                "service.name": service,
                "service.namespace": "trivium",
                "service.instance.id": instance,
                "service.version": importlib.metadata.version("trivium"),
            }
        )
        # Attributes from the environment take precedence over ours.
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_exporter()))
        self._tracer = self._provider.get_tracer("trivium")

    def begin(
        self, name: str, parent: str, is_remote: bool, attributes: Attributes, at: float
    ) -> Span:
        """A span that began at `at`; see trivium.wire.tracing.Begin."""
        span = self._tracer.start_span(
            name,
            context=_context(parent, is_remote) if parent else None,
            kind=trace.SpanKind.SERVER if is_remote else trace.SpanKind.INTERNAL,
            attributes=dict(attributes),
            start_time=_nanoseconds(at),
        )
        return _Recorded(span) if span.get_span_context().is_valid else Span()

    def close(self) -> None:
        """Flushes the remaining spans."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


class _Recorded(Span):
    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.is_recording = span.is_recording()
        of = span.get_span_context()
        self.traceparent = f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}"

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))

    def event(
        self, name: str, at: float | None = None, attributes: Attributes | None = None
    ) -> None:
        time_of = None if at is None else _nanoseconds(at)
        self._span.add_event(name, dict(attributes or {}), time_of)

    def fail(self, description: str) -> None:
        self._span.set_status(trace.StatusCode.ERROR, description)

    def end(self, at: float | None = None) -> None:
        self._span.end(None if at is None else _nanoseconds(at))


def _exporter() -> SpanExporter:
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "grpc"
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

        return over_grpc.OTLPSpanExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

        return over_http.OTLPSpanExporter()
    raise ValueError(
        f"OTEL_EXPORTER_OTLP_PROTOCOL: expected grpc or http/protobuf, not {protocol!r}"
    )


def _context(parent: str, is_remote: bool) -> Context:
    _, trace_id, span_id, flags = parent.split("-")
    of = trace.SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote, trace.TraceFlags(int(flags, 16))
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(of))


def _nanoseconds(at: float) -> int:
    """A monotonic timestamp in seconds, as nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - at) * 1e9)
