"""Prometheus metrics of any process: its resources, build and drain."""

import importlib.metadata
import platform
from collections.abc import Iterator

from prometheus_client import Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from trivium.wire.in_flight import DrainState, InFlight


def register_process(registry: CollectorRegistry, in_flight: InFlight) -> None:
    """Adds process_*, the build, and the drain of what is `in_flight` here."""
    # When each series began, as a series of its own: there are no restarts that the process's
    # start time does not tell.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    ProcessCollector(registry=registry)
    labels = {
        "version": importlib.metadata.version("trivium"),
        "python_version": platform.python_version(),
    }
    text = "1; its labels say which build this is."
    Gauge("trivium_build_info", text, list(labels), registry=registry).labels(**labels).set(1)
    registry.register(DrainCollector(in_flight))


class DrainCollector(Collector):
    """How far the drain of a process is, read at each scrape."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "trivium_drain_state",
            "1 for the current state of the process: none, notice (not ready, still serving) or "
            "drain (refuses new requests).",
            labels=["state"],
        )
        for state in DrainState:
            gauge.add_metric([state.value], state is self._in_flight.state)
        yield gauge
