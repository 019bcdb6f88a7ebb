"""Prometheus metrics of the generator.

What vLLM has too has its name, unless the tokenizer counts it under that name, as its callers see
it: then it is the engine's.

Gauges and the engine's own counters are read at scrape time, so steps pay nothing.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from generator_svc.engine import Load
from generator_svc.metering import Meter
from generator_svc.run.runner import DeviceInfo
from generator_svc.sequence import SequenceUpdate
from trivium.wire.histogram import TokenHistogram

_FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_NEXT_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_MESSAGE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class RequestMetrics(Collector):
    """Counters and histograms observed per call, and `generated`, which counts its tokens."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=registry)

        self._model = model
        labels = {"model_name": model}
        self.prompt_tokens = counter("trivium_engine_prompt_tokens", "Prompt tokens").labels(
            **labels
        )
        self.cached_tokens = counter(
            "vllm:prefix_cache_hits", "Prompt tokens served from the prefix cache"
        ).labels(**labels)
        self.generated = 0  # read at scrape time: a Counter takes a microsecond for each token
        registry.register(self)
        self.first_token = Histogram(
            "trivium_engine_time_to_first_token_seconds",
            "Time from a call's arrival to its first token",
            ["model_name"],
            registry=registry,
            buckets=_FIRST_TOKEN_BUCKETS,
        ).labels(**labels)
        self.next_token = TokenHistogram(
            "trivium_engine_inter_token_latency_seconds",
            "Time between two tokens of a sequence, as they arise; in how many messages they leave "
            "says trivium_engine_message_tokens",
            _NEXT_TOKEN_BUCKETS,
            registry,
        ).labels(model)
        self._message_tokens = Histogram(
            "trivium_engine_message_tokens",
            "Tokens of a message to a caller, those of all its choices: 1 unless they are merged",
            ["model_name"],
            registry=registry,
            buckets=_MESSAGE_BUCKETS,
        ).labels(**labels)
        self._finished = Counter(
            "trivium_engine_calls",
            "Calls that ended, by finish reason; cancelled and failed ones too",
            ["model_name", "finished_reason"],
            registry=registry,
        )

    def sent(self, updates: Sequence[SequenceUpdate]) -> None:
        """Counts a message with these updates."""
        self._message_tokens.observe(len([u for u in updates if u.token is not None]))

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
    registry: CollectorRegistry, model: str, precision: str, device: DeviceInfo
) -> None:
    """What runs where, as the labels of a gauge that is 1."""
    labels = {
        "model_name": model,
        "precision": precision,
        "execution_provider": device.provider,
        "cuda_unavailable": device.cuda_unavailable,
    }
    text = "1; its labels say what runs where, and why not on CUDA if the device is auto"
    Gauge("trivium_engine_info", text, list(labels), registry=registry).labels(**labels).set(1)


class EngineCollector(Collector):
    """The engine's load and metering, read at each scrape."""

    def __init__(self, load: Callable[[], Load], meter: Meter, model: str) -> None:
        self._load = load
        self._meter = meter
        self._model = model

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        gauges = {
            "vllm:num_requests_running": ("Sequences that hold a slot", load.running_sequences),
            "vllm:num_requests_waiting": ("Requests waiting for a slot", load.waiting_requests),
            "vllm:kv_cache_usage_perc": ("Share of slots in use", load.used_slots / load.slots),
            "trivium_slots": ("Slots", load.slots),
            "trivium_slots_in_use": ("Slots held by sequences", load.used_slots),
            "trivium_waiting_prompt_tokens": (
                "Prompt tokens waiting for a slot",
                load.waiting_tokens,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        yield from self._device_time()

    def _device_time(self) -> Iterator[Metric]:
        busy_nanoseconds, overheads, settled = self._meter.snapshot()
        busy = CounterMetricFamily(
            "trivium_device_busy_nanoseconds", "Device time of all runs", labels=["model_name"]
        )
        busy.add_metric([self._model], busy_nanoseconds)
        yield busy
        overhead = CounterMetricFamily(
            "trivium_device_overhead_nanoseconds",
            "Device time not charged to any request",
            labels=["model_name", "reason"],
        )
        for reason, nanoseconds in sorted(overheads.items()):
            overhead.add_metric([self._model, reason], nanoseconds)
        yield overhead
        requests = CounterMetricFamily(
            "trivium_device_request_nanoseconds",
            "Device time of ended sequences by finish reason",
            labels=["model_name", "outcome"],
        )
        for outcome, nanoseconds in sorted(
            (reason.name.lower(), nanos) for reason, nanos in settled.items()
        ):
            requests.add_metric([self._model, outcome], nanoseconds)
        yield requests
