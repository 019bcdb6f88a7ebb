"""When certificates expire, for Prometheus."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Certified(Protocol):
    """One side of TLS: the file of its own certificate, and when what is in use expires."""

    @property
    def certificate(self) -> Path | None: ...

    @property
    def expires_at(self) -> datetime | None: ...


class CertificateCollector(Collector):
    """The certificates of a process: its server's and those of its calls, None without TLS."""

    def __init__(self, *sides: Certified | None) -> None:
        self._sides = [side for side in sides if side is not None]

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "trivium_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use from this file expires, in seconds since 1970.",
            labels=["file"],
        )
        # One file may be both sides'.
        expiries = {side.certificate: side.expires_at for side in self._sides}
        for file, expires_at in expiries.items():
            if expires_at is not None:
                gauge.add_metric([str(file)], expires_at.timestamp())
        yield gauge
