"""Prometheus metrics of every process: its resources, build and drain state."""

import importlib.metadata
import platform
from collections.abc import Iterator

from prometheus_client import Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from trivium.wire.in_flight import DrainState, InFlight


def register_process(registry: CollectorRegistry, in_flight: InFlight) -> None:
    """Registers process_*, the build, and the drain state of `in_flight`."""
    # No separate `_created` series: the process start time already shows every restart.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    ProcessCollector(registry=registry)
    labels = {
        "version": importlib.metadata.version("trivium"),
        "python_version": platform.python_version(),
    }
    text = "Always 1; labels: the versions of Trivium and Python"
    Gauge("trivium_build_info", text, list(labels), registry=registry).labels(**labels).set(1)
    registry.register(DrainCollector(in_flight))


class DrainCollector(Collector):
    """The drain state of a process, read at each scrape."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "trivium_drain_state",
            "1 for the process's current drain state: none, notice (not ready, still serving) or "
            "drain (rejects new requests)",
            labels=["state"],
        )
        for state in DrainState:
            gauge.add_metric([state.value], state is self._in_flight.state)
        yield gauge
