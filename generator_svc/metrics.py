"""Prometheus metrics of the generator.

Metrics that vLLM also has bear vLLM's names, except where the tokenizer exports that name, as seen
by its callers: those are named `trivium_engine_…` here.

Gauges and the engine's own counters are read at scrape time, so they cost the engine's steps
nothing.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from generator_svc.engine import Load
from generator_svc.metering import OVERHEADS, Meter
from generator_svc.run.outcome import DeviceInfo
from generator_svc.sequence import FinishReason, SequenceGroup, SequenceUpdate
from trivium.wire.errors import ERRORS
from trivium.wire.histogram import TokenHistogram

_FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_NEXT_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_MESSAGE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_PHASE_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5),
    *(5, 10, 20, 30, 60, 120, 240, 480),
)
_STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# The block size reported to routers that track prefixes. Slots share prefixes of any length.
_BLOCK_TOKENS = 16


_PHASES = {
    "queue": "Queue time of a finished call (submission to slot), in seconds",
    "prefill": "Prefill time of a finished call (slot to first token), in seconds",
    "decode": "Decode time of a finished call (first to last token), in seconds",
    "inference": "Inference time of a finished call (slot to last token), in seconds",
}


class RequestMetrics(Collector):
    """Counters and histograms observed per call, and `generated`, which counts all its tokens."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=registry)

        self._model = model
        labels = {"model_name": model}
        self.prompt_tokens = counter(
            "trivium_engine_prompt_tokens",
            "Prompt tokens of calls that got a first token, cached ones included",
        ).labels(**labels)
        self.cached_tokens = counter(
            "vllm:prefix_cache_hits", "Prompt tokens served from the prefix cache"
        ).labels(**labels)
        self.queried_tokens = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"
        ).labels(**labels)
        self.generated = 0  # read at scrape time: a Counter would take a microsecond per token
        registry.register(self)
        self.first_token = Histogram(
            "trivium_engine_time_to_first_token_seconds",
            "Time to first token (TTFT) of a call, from its arrival, in seconds",
            ["model_name"],
            registry=registry,
            buckets=_FIRST_TOKEN_BUCKETS,
        ).labels(**labels)
        self.next_token = TokenHistogram(
            "trivium_engine_inter_token_latency_seconds",
            "Inter-token latency (ITL) of a sequence, as sampled, in seconds; "
            "trivium_engine_message_tokens shows how tokens are merged into messages",
            _NEXT_TOKEN_BUCKETS,
            registry,
        ).labels(model)
        self._message_tokens = Histogram(
            "trivium_engine_message_tokens",
            "Tokens per message to the caller, over all choices of the call; 1 unless merged",
            ["model_name"],
            registry=registry,
            buckets=_MESSAGE_BUCKETS,
        ).labels(**labels)
        self._phases = {
            phase: Histogram(
                f"vllm:request_{phase}_time_seconds",
                text,
                ["model_name"],
                registry=registry,
                buckets=_PHASE_BUCKETS,
            ).labels(**labels)
            for phase, text in _PHASES.items()
        }
        self._rejected = Counter(
            "trivium_engine_rejections",
            "Calls rejected before they reached the engine, by error code",
            ["model_name", "reason"],
            registry=registry,
        )
        self._finished = Counter(
            "trivium_engine_calls",
            "Calls that ended, by finish reason, including cancelled and failed ones",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        for code in ERRORS:  # starts at 0, as rate() misses the first increment of a new series
            self._rejected.labels(model, code)
        for outcome in FinishReason:
            self._finished.labels(model, outcome.name.lower())

    def sent(self, updates: Sequence[SequenceUpdate]) -> None:
        """Observes a message that carries these updates."""
        self._message_tokens.observe(len([u for u in updates if u.token is not None]))

    def phases(self, group: SequenceGroup, first_token: float, last_token: float) -> None:
        """Observes the phases of a finished call; `first_token` and `last_token` are monotonic
        times in seconds."""
        scheduled = group.scheduled_at
        assert scheduled is not None, "A call has tokens but never got a slot. This is a bug."
        self._phases["queue"].observe(scheduled - group.queued_at)
        self._phases["prefill"].observe(first_token - scheduled)
        self._phases["decode"].observe(last_token - first_token)
        self._phases["inference"].observe(last_token - scheduled)

    def rejected(self, reason: str) -> None:
        """Counts a call that was refused before it reached the engine."""
        self._rejected.labels(model_name=self._model, reason=reason).inc()

    def finished(self, reason: str) -> None:
        """Counts a call that ended."""
        self._finished.labels(model_name=self._model, finished_reason=reason).inc()

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "trivium_engine_generation_tokens", "Tokens generated", labels=["model_name"]
        )
        tokens.add_metric([self._model], self.generated)
        yield tokens


def register_info(
    registry: CollectorRegistry, model: str, precision: str, device: DeviceInfo, prefix_cache: bool
) -> None:
    """Registers gauges of value 1 whose labels describe the model, the device and the KV cache."""
    labels = {
        "model_name": model,
        "precision": precision,
        "execution_provider": device.provider,
        "cuda_unavailable": device.cuda_unavailable,
    }
    text = (
        "Always 1; labels: the model, its precision, the execution provider, and why CUDA is "
        "unavailable if the device is auto"
    )
    _info(registry, "trivium_engine_info", text, labels)
    labels = {
        "model_name": model,
        "block_size": str(_BLOCK_TOKENS),
        "num_gpu_blocks": str(device.slots * device.slot_length // _BLOCK_TOKENS),
        "cache_dtype": device.dtype,
        "enable_prefix_caching": str(prefix_cache),
        "slots": str(device.slots),
        "slot_length": str(device.slot_length),
    }
    text = (
        "Always 1; labels: the size of the KV cache, in blocks as in vLLM (also on the CPU) and "
        "in slots"
    )
    _info(registry, "vllm:cache_config_info", text, labels)


def _info(registry: CollectorRegistry, name: str, text: str, labels: dict[str, str]) -> None:
    Gauge(name, text, list(labels), registry=registry).labels(**labels).set(1)


class EngineCollector(Collector):
    """The engine's load and metering, read at each scrape."""

    def __init__(
        self,
        load: Callable[[], Load],
        cache_usage: Callable[[], float],
        meter: Meter,
        model: str,
    ) -> None:
        self._load = load
        self._cache_usage = cache_usage
        self._meter = meter
        self._model = model

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        gauges = {
            "vllm:num_requests_running": (
                "Running sequences: those that hold a slot",
                load.running_sequences,
            ),
            "vllm:num_requests_waiting": ("Requests waiting for a slot", load.waiting_requests),
            "vllm:kv_cache_usage_perc": (
                "KV cache usage: tokens of running sequences as a share of its capacity, 0 to 1",
                self._cache_usage(),
            ),
            "trivium_slots": ("KV cache slots", load.slots),
            "trivium_slots_in_use": ("KV cache slots held by running sequences", load.used_slots),
            "trivium_waiting_prompt_tokens": (
                "Prompt tokens of requests waiting for a slot",
                load.waiting_tokens,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        yield self._step_tokens()
        yield from self._device_time()

    def _step_tokens(self) -> Metric:
        steps = self._meter.steps.copy()
        histogram = HistogramMetricFamily(
            "vllm:iteration_tokens_total",
            "Tokens computed per engine step, prefill and decode",
            labels=["model_name"],
        )
        buckets = [
            (str(float(bound)), float(sum(n for tokens, n in steps.items() if tokens <= bound)))
            for bound in _STEP_BUCKETS
        ]
        buckets.append(("+Inf", float(steps.total())))
        total = sum(tokens * n for tokens, n in steps.items())
        histogram.add_metric([self._model], buckets, total)
        return histogram

    def _device_time(self) -> Iterator[Metric]:
        busy_nanoseconds, overheads, settled = self._meter.snapshot()
        busy = CounterMetricFamily(
            "trivium_device_busy_nanoseconds",
            "Device time of all runs, in nanoseconds",
            labels=["model_name"],
        )
        busy.add_metric([self._model], busy_nanoseconds)
        yield busy
        overhead = CounterMetricFamily(
            "trivium_device_overhead_nanoseconds",
            "Device time not charged to any request, by reason, in nanoseconds",
            labels=["model_name", "reason"],
        )
        for reason in OVERHEADS:
            overhead.add_metric([self._model, reason], overheads[reason])
        yield overhead
        requests = CounterMetricFamily(
            "trivium_device_request_nanoseconds",
            "Device time of ended sequences, by finish reason, in nanoseconds",
            labels=["model_name", "outcome"],
        )
        for outcome in FinishReason:
            requests.add_metric([self._model, outcome.name.lower()], settled[outcome])
        yield requests
