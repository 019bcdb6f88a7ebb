"""A Prometheus histogram for per-token observations, which take 0.2 us here, not 2."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry


class TokenHistogram(Collector):
    """A histogram of seconds per model. One thread observes; any thread may collect."""

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = (*buckets, math.inf)
        self._by_model: dict[str, TokenHistogramOfModel] = {}
        registry.register(self)

    def labels(self, model: str) -> "TokenHistogramOfModel":
        """The histogram of one model."""
        return self._by_model.setdefault(model, TokenHistogramOfModel(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        for model, histogram in self._by_model.copy().items():
            buckets, total = histogram.cumulative()
            family.add_metric([model], buckets, total)
        yield family


class TokenHistogramOfModel:
    """Counts of observations per bucket, by upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self._sum = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Adds `count` equal observations."""
        self._counts[bisect_left(self._bounds, seconds)] += count
        self._sum += seconds * count

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' cumulative buckets, and the sum."""
        found, below = [], 0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            below += count
            found.append(("+Inf" if math.isinf(bound) else str(float(bound)), float(below)))
        return found, self._sum
