"""Prometheus metrics of this service, under vLLM's names where it has the same.

A `RequestMeter` lives as long as a request does.
"""

import asyncio
import time
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from tokenizer_svc.generator.types import TokenUpdate
from tokenizer_svc.output.events import Delta
from trivium.wire.errors import ServiceError
from trivium.wire.histogram import TokenHistogram

_LABELS = ["model_name"]
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 480)


class Metrics:
    """The metrics of a process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "trivium_requests_total",
            "Chat and completion requests that ended, by error code, or ok.",
            ["code"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "trivium_requests_in_flight",
            "Chat and completion requests in flight.",
            registry=registry,
        )
        self.success = Counter(
            "vllm:request_success_total",
            "Choices that finished, by reason.",
            [*_LABELS, "finished_reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens_total", "Tokens of prompts.", _LABELS, registry=registry
        )
        self.generation_tokens = Counter(
            "vllm:generation_tokens_total", "Tokens generated.", _LABELS, registry=registry
        )
        self.time_to_first_token = _seconds(
            "time_to_first_token",
            "Time to first token (TTFT), from the request's arrival.",
            _FIRST_TOKEN_BUCKETS,
            registry,
        )
        self.inter_token_latency = TokenHistogram(
            "vllm:inter_token_latency_seconds",
            "Inter-token latency (ITL) of a choice; tokens that come in one message share its gap.",
            _TOKEN_BUCKETS,
            registry,
        )
        self.request_latency = _seconds(
            "e2e_request_latency",
            "End-to-end latency of a request, to its last token.",
            _REQUEST_BUCKETS,
            registry,
        )

    def request(self) -> "RequestMeter":
        """A context manager around one request."""
        return RequestMeter(self)


def _seconds(
    name: str, what: str, buckets: tuple[float, ...], registry: CollectorRegistry
) -> Histogram:
    return Histogram(f"vllm:{name}_seconds", what, _LABELS, buckets=buckets, registry=registry)


class RequestMeter:
    """Notes the times and tokens of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._model = ""
        self._start = time.monotonic()
        self._last: dict[int, float] = {}

    def __enter__(self) -> "RequestMeter":
        self._metrics.in_flight.inc()
        return self

    def prompt(self, model: str, tokens: int) -> None:
        """The request is for `model`, and its prompt has so many tokens."""
        self._model = model
        self._metrics.prompt_tokens.labels(model).inc(tokens)
        # Looked up once and not for each token.
        self._generated = self._metrics.generation_tokens.labels(model)
        self._gaps = self._metrics.inter_token_latency.labels(model)

    def step(self, updates: list[TokenUpdate], deltas: list[Delta], first_index: int = 0) -> None:
        """A message of the generator came just now, and this is what followed.

        The message's own choices count from `first_index` among the request's.
        """
        now = time.monotonic()
        for update in updates:
            if update.token_ids:
                self._tokens(first_index + update.index, len(update.token_ids), now)
        for delta in deltas:
            if delta.finish_reason is not None:
                self._metrics.success.labels(self._model, delta.finish_reason.value).inc()

    def _tokens(self, index: int, count: int, now: float) -> None:
        if not self._last:
            self._metrics.time_to_first_token.labels(self._model).observe(now - self._start)
        if index in self._last:
            self._gaps.observe((now - self._last[index]) / count, count)
        self._last[index] = now
        self._generated.inc(count)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(_code(error)).inc()
        if error is None:
            seconds = time.monotonic() - self._start
            self._metrics.request_latency.labels(self._model).observe(seconds)


def _code(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, ServiceError):
        return error.code
    left = isinstance(error, (asyncio.CancelledError, GeneratorExit))
    return "client_closed_request" if left else "internal_error"
