"""The engine: one thread that owns all sequences, slots and the device, and runs step after step.

Other threads post commands to its inbox; all updates of a step are passed to `deliver` in one call.
Knows nothing about gRPC, asyncio or text.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from generator_svc.admission import Admission
from generator_svc.metering import CACHE_MOVES, REPREFILL, Meter
from generator_svc.run.outcome import Runner, StepOutcome
from generator_svc.sampling.device_sampler import LogitsRow, sample_all
from generator_svc.sampling.prompt_logprobs import score
from generator_svc.scheduler import ScheduledStep, Scheduler
from generator_svc.sequence import (
    EngineRequest,
    FinishReason,
    Sequence,
    SequenceGroup,
    SequenceStatus,
    SequenceUpdate,
)

log = logging.getLogger(__name__)

# How long the engine has to be idle before it re-prefills finished answers: longer than a program
# takes to send its next request, shorter than a person takes to type one.
_IDLE_BEFORE_REPREFILL_SECONDS = 0.1


@dataclass(frozen=True)
class Load:
    """A snapshot of how busy the engine is."""

    waiting_requests: int
    waiting_tokens: int
    waiting_sequences: int
    running_sequences: int
    used_slots: int
    slots: int

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: no request is waiting and no sequence holds a slot."""
        return not (self.waiting_requests or self.running_sequences or self.used_slots)


class Engine:
    """Continuous batching. `submit`, `stop`, `cancel`, `load`, `running_step` and `prefill_seconds`
    may be called from any thread.

    `deliver` is called on the engine's thread with the updates of a step; it must not block.
    `on_fault` is called there if the engine itself fails, which ends its thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        meter: Meter,
        admission: Admission,
        deliver: Callable[[list[SequenceUpdate]], None],
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self.meter = meter
        self._scheduler = scheduler
        self._runner = runner
        self._admission = admission
        self._deliver = deliver
        self._on_fault = on_fault
        self._inbox: deque[Callable[[], list[SequenceUpdate] | None]] = deque()
        self._wake = threading.Event()
        self._steps = 0  # begun and ended, so that it is odd while one is running
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Starts the thread and waits until it has run `prepare`, whose exception is raised here.

        `prepare` warms the device up on the thread that will use it: on CUDA, captured graphs and
        attention plans belong to the thread that created them.
        """
        prepared: Future[None] = Future()
        arguments = (prepare, prepared)
        self._thread = threading.Thread(
            target=self._run, name="engine", args=arguments, daemon=True
        )
        self._thread.start()
        prepared.result()

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread after the current step and cancels all sequences in flight.

        Waits for it, for at most `timeout` seconds.
        """
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def submit(self, request: EngineRequest, tag: Any = None) -> SequenceGroup:
        """Queues a validated request; raises QueueFull. Its updates carry the returned group."""
        permit = self._admission.enter(len(request.prompt))
        group = SequenceGroup(request, permit, tag)
        self._post(lambda: self._scheduler.add(group))
        return group

    def stop(self, group: SequenceGroup, index: int) -> None:
        """Ends one sequence, with a last update; no effect on a finished one."""
        self._post(lambda: self._stop(group.sequences[index]))

    def cancel(self, group: SequenceGroup, on_settled: Callable[[], None] = lambda: None) -> None:
        """Ends all of a group's sequences without further updates; idempotent.

        `on_settled` is called on the engine's thread once no more device time can be charged to
        them.
        """

        def command() -> None:
            self._scheduler.cancel(group)
            on_settled()

        self._post(command)

    def load(self) -> Load:
        """A snapshot; for any thread."""
        cache = self._scheduler.cache
        return Load(
            waiting_requests=self._admission.requests,
            waiting_tokens=self._admission.tokens,
            waiting_sequences=len(self._scheduler.waiting),
            running_sequences=len(self._scheduler.running),
            used_slots=cache.used_slots,
            slots=cache.num_slots,
        )

    def cache_usage(self) -> float:
        """Tokens that sequences hold in the KV cache, as a share of its capacity; any thread."""
        cache = self._scheduler.cache
        return cache.used_tokens / (cache.num_slots * cache.slot_length)

    def prefill_seconds(self, tokens: int) -> float:
        """Estimated seconds to prefill `tokens` prompt tokens, by past steps; any thread."""
        return tokens * self._scheduler.prefill_cost.cost(0) / 1e9

    def running_step(self) -> int | None:
        """A number that no other step has, while one is running; None between steps."""
        steps = self._steps
        return steps if steps % 2 else None

    def step(self) -> None:
        """Drain the inbox, schedule, run, sample, deliver."""
        updates = self._drain_inbox()
        step = self._scheduler.schedule()
        outcome = self._runner.run(step.plan)
        self._charge(step, outcome)
        self._scheduler.observe(step, _prefill_times(outcome))
        tokens, failures = sample_all(_drawing(step, outcome))
        failures += _failed_runs(step, outcome) + _score_prompts(step, outcome)
        updates += self._scheduler.commit(step, tokens, failures)
        if updates:
            self._deliver(updates)

    def reprefill(self) -> None:
        """Re-prefills one tile of a finished answer for the next turn; charged as overhead.

        A tile takes about as long as a few decode steps, so it hardly delays a new request.
        """
        plan = self._scheduler.schedule_reprefill()
        if plan is None:
            return
        (result,) = self._runner.run(plan).chunks
        self.meter.charge_overhead(result.nanoseconds, REPREFILL)
        if result.error is not None:
            log.warning("re-prefilling a finished answer failed: %s", result.error)
        self._scheduler.commit_reprefill(plan, failed=result.error is not None)

    def check_integrity(self) -> None:
        """Raises AssertionError if the bookkeeping is inconsistent. Call between steps only."""
        self._scheduler.check_integrity()
        self.meter.check_integrity(self._scheduler.running)

    def _run(self, prepare: Callable[[], None], prepared: Future[None]) -> None:
        try:
            prepare()
        except BaseException as error:
            prepared.set_exception(error)
            return
        prepared.set_result(None)
        try:
            while not self._closed:
                if self._inbox or self._scheduler.has_work:
                    self._run_step(self.step)
                    continue
                self.check_integrity()
                self._wait_idle()
            self._drain_inbox()
            for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
                self._scheduler.cancel(sequence.group)
        except BaseException as fault:
            log.critical("engine failure, the process exits", exc_info=fault)
            self._on_fault(fault)

    def _run_step(self, step: Callable[[], None]) -> None:
        self._steps += 1
        step()
        self._steps += 1

    def _wait_idle(self) -> None:
        """Waits for a command; after a while, re-prefills finished answers in the meantime."""
        timeout = _IDLE_BEFORE_REPREFILL_SECONDS
        while not self._wake.wait(timeout if self._scheduler.has_reprefills else None):
            self._run_step(self.reprefill)
            timeout = 0.0
        self._wake.clear()

    def _post(self, command: Callable[[], list[SequenceUpdate] | None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _drain_inbox(self) -> list[SequenceUpdate]:
        updates: list[SequenceUpdate] = []
        while self._inbox:
            updates += self._inbox.popleft()() or ()
        return updates

    def _stop(self, sequence: Sequence) -> list[SequenceUpdate]:
        if sequence.status is SequenceStatus.FINISHED:
            return []
        self._scheduler.finish(sequence, FinishReason.STOPPED)
        return [SequenceUpdate(sequence.group, sequence, is_finished=True)]

    def _charge(self, step: ScheduledStep, outcome: StepOutcome) -> None:
        if outcome.move_nanoseconds:
            self.meter.charge_overhead(outcome.move_nanoseconds, CACHE_MOVES)
        for sequences, batch, result in zip(
            step.batches, step.plan.batches, outcome.batches, strict=True
        ):
            shares: list[tuple[Sequence | None, int]] = [
                (sequence, len(prompt))
                for sequence, prompt in zip(sequences, batch.prompts, strict=True)
            ]
            self.meter.charge(result.nanoseconds, [*shares, (None, batch.padding)])
        for sequence, chunk, result in zip(
            step.chunks, step.plan.chunks, outcome.chunks, strict=True
        ):
            self.meter.charge(result.nanoseconds, [(sequence, len(chunk.token_ids))])
        if outcome.rows is not None:
            self.meter.charge_rows(outcome.rows.nanoseconds, step.rows)
        tokens = sum(len(prompt) for batch in step.plan.batches for prompt in batch.prompts)
        tokens += sum(len(chunk.token_ids) for chunk in step.plan.chunks)
        tokens += len(step.rows) - step.rows.count(None)
        if tokens:
            self.meter.steps[tokens] += 1


def _drawing(step: ScheduledStep, outcome: StepOutcome) -> Iterator[tuple[Sequence, LogitsRow]]:
    """The sequences that sample a token in this step, each with its row of logits."""
    for sequence in step.forks:
        yield sequence, sequence.group.prompt_logits
    sequences = (*step.batches, *((sequence,) for sequence in step.chunks))
    for owners, result in zip(sequences, outcome.prefills, strict=True):
        if result.logits is None:
            continue
        for sequence, logits in zip(owners, result.logits, strict=True):
            if sequence.request.n > 1:
                sequence.group.prompt_logits = logits
            yield sequence, logits
    if outcome.rows is not None and outcome.rows.logits is not None:
        for owner, logits in zip(step.rows, outcome.rows.logits, strict=True):
            if owner is not None:
                yield owner, logits


def _prefill_times(outcome: StepOutcome) -> list[int | None]:
    """Nanoseconds of each prefill run. None for failed runs, which may have ended early, and for
    runs that returned the logits of all tokens, which are slower than ordinary ones."""
    return [
        None if run.error or run.all_logits is not None else run.nanoseconds
        for run in outcome.prefills
    ]


def _score_prompts(
    step: ScheduledStep, outcome: StepOutcome
) -> list[tuple[Sequence, BaseException]]:
    """Stores requested log-probabilities of prompts; returns the sequences with bad logits."""
    failures: list[tuple[Sequence, BaseException]] = []
    for sequence, result in zip(step.chunks, outcome.chunks, strict=True):
        if result.all_logits is not None:
            error = score(sequence, result.all_logits)
            if error is not None:
                failures.append((sequence, error))
    return failures


def _failed_runs(step: ScheduledStep, outcome: StepOutcome) -> list[tuple[Sequence, BaseException]]:
    """The sequences in failed runs, each with the error."""
    failures = []
    for sequences, result in zip(step.batches, outcome.batches, strict=True):
        if result.error is not None:
            failures += [(sequence, result.error) for sequence in sequences]
    for sequence, result in zip(step.chunks, outcome.chunks, strict=True):
        if result.error is not None:
            failures.append((sequence, result.error))
    if outcome.rows is not None and outcome.rows.error is not None:
        error = outcome.rows.error
        failures += [(owner, error) for owner in step.rows if owner is not None]
    return failures
