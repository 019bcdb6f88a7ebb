"""Prometheus metrics of this service."""

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from trivium.wire.errors import ERRORS
from trivium.wire.in_flight import InFlight
from trivium.wire.process_metrics import register_process
from trivium.wire.replicas.metrics import ReplicaCollector
from trivium.wire.replicas.replica_set import ReplicaSetStatus

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trivium_http_requests",
            "HTTP requests answered, by route and status; 499: the client disconnected first.",
            ("route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "trivium_http_request_seconds",
            "Time from a request's headers to the end of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.running = Gauge(
            "trivium_http_requests_running", "API requests in flight.", registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "trivium_http_time_to_first_token_seconds",
            "Time from a streaming request's headers to its first text.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.rejections = Counter(
            "trivium_http_rejections",
            "API requests answered with an error, by its code.",
            ("code",),
            registry=self.registry,
        )
        self.disconnects = Counter(
            "trivium_http_disconnects",
            "Clients that disconnected before their answer was complete.",
            registry=self.registry,
        )
        self.stream_errors = Counter(
            "trivium_http_stream_errors",
            "Streams that ended with an error event, by code.",
            ("code",),
            registry=self.registry,
        )
        for code in ERRORS:  # a series that first appears at 1 has no rate
            self.rejections.labels(code)
            self.stream_errors.labels(code)

    def follow(self, status: Callable[[], ReplicaSetStatus], in_flight: InFlight) -> None:
        """Also exports the requests in flight, and the state of the tokenizer's replicas."""
        self.running.set_function(lambda: in_flight.count)
        self.registry.register(ReplicaCollector({"": status}))
        register_process(self.registry, in_flight)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
