"""Usage: a record of every call that the engine accepted, and totals by API key.

Written here because device time is settled here: the record is complete whatever happens to the
caller, the tokenizer or the facade.
"""

import asyncio
import logging
import re
import time

from prometheus_client import Counter
from prometheus_client.registry import CollectorRegistry

from generator_svc.delivery import UpdateQueue
from generator_svc.sequence import CompletionReport, FinishReason, SequenceGroup
from trivium.usage_log import UsageLog, UsageRecord
from trivium.wire import telemetry

log = logging.getLogger(__name__)

# OpenAI's terms, and vLLM's where OpenAI has none.
_FINISH_REASONS = {
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOPPED: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.FAILED: "error",
}

_FINISH_REASON = re.compile("[a-z_]{1,32}")  # a report may have newer ones than this process knows


class UsageMetrics:
    """Totals of ended calls, by API key."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        labels = ["model_name", "key"]
        self._nanoseconds = Counter(
            "trivium_key_device_nanoseconds",
            "Device time of ended calls by API key, in nanoseconds; the key is empty if none is "
            "required",
            labels,
            registry=registry,
        )
        self._tokens = Counter(
            "trivium_key_tokens",
            "Tokens of ended calls by API key and type: prompt, cached (the part of the prompt "
            "from the prefix cache), completion",
            [*labels, "type"],
            registry=registry,
        )

    def ended(self, record: UsageRecord) -> None:
        """Adds a record."""
        self._nanoseconds.labels(self._model, record.key).inc(record.device_nanoseconds)
        for kind in ("prompt", "cached", "completion"):
            tokens = getattr(record, f"{kind}_tokens")
            self._tokens.labels(self._model, record.key, kind).inc(tokens)


class UsageRecorder:
    """Writes each call's record once it has ended and is settled; for the event loop's thread."""

    def __init__(self, log: UsageLog, metrics: UsageMetrics, model: str) -> None:
        self._log = log
        self._metrics = metrics
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._open: set[CallUsage] = set()

    def begin(self, group: SequenceGroup, queue: UpdateQueue) -> "CallUsage":
        """Begins the record of the current call, which the engine has accepted."""
        usage = CallUsage(self, group, queue)
        self._open.add(usage)
        return usage

    def settled(self, usage: "CallUsage") -> None:
        """Writes the record of a call that has ended and is charged no more. For any thread."""
        self._loop.call_soon_threadsafe(self._write, usage)

    def close(self) -> None:
        """Writes all remaining records; call it after the engine's thread has ended, when all calls
        are settled."""
        for usage in tuple(self._open):
            self._write(usage)
        self._log.close()

    def _write(self, usage: "CallUsage") -> None:
        if usage in self._open:
            self._open.remove(usage)
            record = usage.record(self._model)
            self._metrics.ended(record)
            self._log.write(record)


class CallUsage:
    """What goes into a call's record. `status` is an HTTP status, `report` the caller's report."""

    def __init__(self, recorder: UsageRecorder, group: SequenceGroup, queue: UpdateQueue) -> None:
        self._recorder = recorder
        self._group = group
        self._queue = queue
        self._identity = telemetry.request_id.get(), telemetry.trace_id(), telemetry.key_name.get()
        self._seconds: float | None = None
        self.status = 499
        self.report: CompletionReport | None = None

    def end(self) -> None:
        """Records that the call has ended now; its device time may not be settled yet."""
        self._seconds = time.monotonic() - self._queue.arrived_at

    def settled(self) -> None:
        """Has the record written; for any thread, after `end`."""
        self._recorder.settled(self)

    def record(self, model: str) -> UsageRecord:
        """The call's record, once it is settled."""
        if self._seconds is None:
            self.end()
        assert self._seconds is not None
        sequences, report = self._group.sequences, self._possible_report()
        request_id, trace_id, key = self._identity
        reasons = [
            _FINISH_REASONS[sequence.finish_reason or FinishReason.CANCELLED]
            for sequence in sequences
        ]
        return UsageRecord(
            service="generator_svc",
            request_id=request_id,
            trace_id=trace_id,
            key=key,
            model=model,
            status=self.status,
            finish_reason=",".join(dict.fromkeys(report.finish_reasons if report else reasons)),
            duration_seconds=self._seconds,
            # Only those computed or taken from the cache: none of a prompt that was still waiting.
            prompt_tokens=max(min(s.computed, s.prompt_length) for s in sequences),
            cached_tokens=sequences[0].cached_prompt_tokens,
            completion_tokens=(
                report.completion_tokens if report else sum(s.generated for s in sequences)
            ),
            reasoning_tokens=report.reasoning_tokens if report else None,
            device_nanoseconds=sum(sequence.device_nanoseconds for sequence in sequences),
            queue_seconds=self._queue_seconds(self._queue.arrived_at + self._seconds),
            ttft_seconds=self._queue.first_token_seconds,
        )

    def _possible_report(self) -> CompletionReport | None:
        """The caller's report, unless it contradicts what was generated."""
        report = self.report
        if report is None:
            return None
        generated = sum(sequence.generated for sequence in self._group.sequences)
        if 0 <= report.reasoning_tokens <= report.completion_tokens <= generated and all(
            map(_FINISH_REASON.fullmatch, report.finish_reasons)
        ):
            return report
        log.warning("impossible completion report of %s ignored", self._identity[0])
        return None

    def _queue_seconds(self, ended_at: float) -> float:
        """Seconds from submission to the first slot, or to the call's end if it got none."""
        scheduled_at = self._group.scheduled_at
        return (ended_at if scheduled_at is None else scheduled_at) - self._group.queued_at
