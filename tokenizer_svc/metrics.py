"""Prometheus metrics of this service, under vLLM's names where it has the same ones.

A `RequestMeter` lives as long as its request. Metrics named `vllm:request_…` count each request
once, whatever its `n`, so that with no request in flight

    sum of vllm:request_success_total = count of vllm:request_prompt_tokens
    vllm:prompt_tokens_total = sum of vllm:request_prompt_tokens

and likewise for generated tokens.
"""

import time
from collections.abc import Iterable
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tokenizer_svc.generator.types import TokenUpdate
from tokenizer_svc.output.events import Delta, FinishReason
from trivium.wire.errors import CLIENT_LEFT, ERRORS, code_of
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
_LENGTH_BUCKETS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))
# Why a request ended, in vLLM's words. A tool call is a stop: the model was done.
_STOP, _LENGTH, _ABORT, _ERROR = _REASONS = ("stop", "length", "abort", "error")
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 480)


class Metrics:
    """The metrics of a process, in their own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
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
            "Admitted requests that ended, by reason: length if any choice was cut off, abort if "
            "the caller disconnected.",
            [*_LABELS, "finished_reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens_total", "Prompt tokens.", _LABELS, registry=registry
        )
        self.generation_tokens = Counter(
            "vllm:generation_tokens_total", "Tokens generated.", _LABELS, registry=registry
        )
        self.request_prompt_tokens = Histogram(
            "vllm:request_prompt_tokens",
            "Prompt tokens of a request.",
            _LABELS,
            buckets=_LENGTH_BUCKETS,
            registry=registry,
        )
        self.request_generation_tokens = Histogram(
            "vllm:request_generation_tokens",
            "Tokens generated for a request, by all its choices.",
            _LABELS,
            buckets=_LENGTH_BUCKETS,
            registry=registry,
        )
        self.time_to_first_token = _seconds(
            "time_to_first_token",
            "Time to first token (TTFT), from the request's arrival.",
            _FIRST_TOKEN_BUCKETS,
            registry,
        )
        self.inter_token_latency = TokenHistogram(
            "vllm:inter_token_latency_seconds",
            "Inter-token latency (ITL) of a choice; tokens that arrive together share the gap.",
            _TOKEN_BUCKETS,
            registry,
        )
        self.request_latency = _seconds(
            "e2e_request_latency",
            "End-to-end latency of a request; aborted and failed ones are not counted.",
            _REQUEST_BUCKETS,
            registry,
        )

    def initialize(self, models: Iterable[str]) -> None:
        """Exports zeros for these models: a series that first appears at 1 has no rate."""
        for code in ("ok", *ERRORS):
            self.requests.labels(code)
        of_models = (
            *(self.prompt_tokens, self.generation_tokens),
            *(self.request_prompt_tokens, self.request_generation_tokens),
            *(self.time_to_first_token, self.inter_token_latency, self.request_latency),
        )
        for model in models:
            for reason in _REASONS:
                self.success.labels(model, reason)
            for metric in of_models:
                metric.labels(model)

    def request(self) -> "RequestMeter":
        """A context manager around one request."""
        return RequestMeter(self)


def _seconds(
    name: str, what: str, buckets: tuple[float, ...], registry: CollectorRegistry
) -> Histogram:
    return Histogram(f"vllm:{name}_seconds", what, _LABELS, buckets=buckets, registry=registry)


class RequestMeter:
    """Measures the times and tokens of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._model = ""
        self._start = time.monotonic()
        self._last: dict[int, float] = {}
        self._prompt_tokens = self._generated_tokens = 0
        self._is_truncated = False  # whether any choice was cut off

    def __enter__(self) -> "RequestMeter":
        self._metrics.in_flight.inc()
        return self

    def prompt(self, model: str, tokens: int) -> None:
        """Records that a prompt of this many tokens was admitted."""
        self._model = model
        self._prompt_tokens += tokens
        self._metrics.prompt_tokens.labels(model).inc(tokens)
        # Looked up once, not for each token.
        self._generated = self._metrics.generation_tokens.labels(model)
        self._gaps = self._metrics.inter_token_latency.labels(model)

    def step(self, updates: list[TokenUpdate], deltas: list[Delta], first_index: int = 0) -> None:
        """Records a generator message that just arrived, and the deltas decoded from it.

        The message's choice 0 is the request's choice `first_index`.
        """
        now = time.monotonic()
        for update in updates:
            if update.token_ids:
                self._tokens(first_index + update.index, len(update.token_ids), now)
        for delta in deltas:
            if delta.finish_reason is FinishReason.LENGTH:
                self._is_truncated = True

    def _tokens(self, index: int, count: int, now: float) -> None:
        if not self._last:
            self._metrics.time_to_first_token.labels(self._model).observe(now - self._start)
        if index in self._last:
            self._gaps.observe((now - self._last[index]) / count, count)
        self._last[index] = now
        self._generated.inc(count)
        self._generated_tokens += count

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._metrics.in_flight.dec()
        code = code_of(error)
        self._metrics.requests.labels(code).inc()
        if not self._model:
            return
        metrics, model = self._metrics, self._model
        metrics.request_prompt_tokens.labels(model).observe(self._prompt_tokens)
        metrics.request_generation_tokens.labels(model).observe(self._generated_tokens)
        # A caller whose deadline expired has left as well, which the operator cannot help.
        reason = _ABORT if code in (CLIENT_LEFT, "deadline_exceeded") else _ERROR
        if error is None:
            reason = _LENGTH if self._is_truncated else _STOP
            metrics.request_latency.labels(model).observe(time.monotonic() - self._start)
        metrics.success.labels(model, reason).inc()
