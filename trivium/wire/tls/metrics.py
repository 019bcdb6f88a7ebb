"""Prometheus metrics of certificate expiry."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class TlsEndpoint(Protocol):
    """A TLS server or client: the file of its certificate, and when the one in use expires."""

    @property
    def certificate(self) -> Path | None: ...

    @property
    def expires_at(self) -> datetime | None: ...


class CertificateCollector(Collector):
    """The certificates of a process: its server's and its channels'; None for those without TLS."""

    def __init__(self, *endpoints: TlsEndpoint | None) -> None:
        self._endpoints = [endpoint for endpoint in endpoints if endpoint is not None]

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "trivium_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use from this file expires, in seconds since 1970",
            labels=["file"],
        )
        # Server and channel may share one file.
        expiries = {endpoint.certificate: endpoint.expires_at for endpoint in self._endpoints}
        for file, expires_at in expiries.items():
            if expires_at is not None:
                gauge.add_metric([str(file)], expires_at.timestamp())
        yield gauge
