"""The engine: one thread that owns all sequences, slots and the device, and steps.

Others post commands to its inbox; what a step brings goes to `deliver`, once a step. Knows
nothing about gRPC, asyncio or text.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from generator_svc.admission import Admission
from generator_svc.metering import ANSWERS, CACHE_MOVES, Meter
from generator_svc.run.logits_buffers import Logits
from generator_svc.run.runner import Outcome, Runner
from generator_svc.sampling.device_row import DeviceRow, GreedyRow
from generator_svc.sampling.device_sampler import sample_all
from generator_svc.scheduler import Scheduler, Step
from generator_svc.sequence import FinishReason, Generation, Group, Sequence, Stage, Update

log = logging.getLogger(__name__)

LogitsRow = Logits | DeviceRow | GreedyRow  # float32 [vocabulary]

# How long there has to be nothing to do before finished answers are computed as prompts: longer
# than a program takes to send its next request, shorter than a person takes to write.
_PATIENCE_SECONDS = 0.1


@dataclass(frozen=True)
class Load:
    """How busy the engine is."""

    waiting_requests: int
    waiting_tokens: int
    waiting_sequences: int
    running_sequences: int
    used_slots: int
    slots: int


class Engine:
    """Generates for many at once. `submit`, `stop` and `cancel` may be called by any thread.

    `deliver` is called on the engine's thread with the updates of a step; it must not block.
    `on_fault` is called there when the engine itself fails, which ends it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        meter: Meter,
        admission: Admission,
        deliver: Callable[[list[Update]], None],
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self.meter = meter
        self._scheduler = scheduler
        self._runner = runner
        self._admission = admission
        self._deliver = deliver
        self._on_fault = on_fault
        self._inbox: deque[Callable[[], list[Update] | None]] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Starts the thread and waits until it has run `prepare`, which may raise here.

        On CUDA, captured graphs and attention plans belong to the thread that made them.
        """
        prepared: Future[None] = Future()
        arguments = (prepare, prepared)
        self._thread = threading.Thread(
            target=self._run, name="engine", args=arguments, daemon=True
        )
        self._thread.start()
        prepared.result()

    def close(self) -> None:
        """Ends the thread after the current step; what still runs is cancelled."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def submit(self, generation: Generation, tag: Any = None) -> Group:
        """Queues a checked request; raises QueueFull. Its updates carry the returned group."""
        permit = self._admission.enter(len(generation.prompt))
        group = Group(generation, permit, tag)
        self._post(lambda: self._scheduler.add(group))
        return group

    def stop(self, group: Group, index: int) -> None:
        """Ends one sequence, whose last update follows; one that has ended stays as it is."""
        self._post(lambda: self._stop(group.sequences[index]))

    def cancel(self, group: Group) -> None:
        """Ends all of a group's sequences; no update follows. May be called again."""
        self._post(lambda: self._scheduler.cancel(group))

    def load(self) -> Load:
        """A snapshot, from any thread."""
        cache = self._scheduler.cache
        return Load(
            waiting_requests=self._admission.requests,
            waiting_tokens=self._admission.tokens,
            waiting_sequences=len(self._scheduler.waiting),
            running_sequences=len(self._scheduler.running),
            used_slots=cache.used_slots,
            slots=cache.num_slots,
        )

    def step(self) -> None:
        """Drain the inbox, schedule, run, sample, deliver."""
        updates = self._drain_inbox()
        step = self._scheduler.schedule()
        outcome = self._runner.run(step.plan)
        self._charge(step, outcome)
        self._scheduler.observe(step, (chunk.nanoseconds for chunk in outcome.chunks))
        tokens, failures = sample_all(_drawing(step, outcome))
        failures += _failed_runs(step, outcome)
        updates += self._scheduler.commit(step, tokens, failures)
        if updates:
            self._deliver(updates)

    def prefill_answer(self) -> None:
        """Computes some of a finished answer as the next turn's prompt would; nobody pays for it.

        That takes as long as a few tokens do, so a request that comes meanwhile hardly waits.
        """
        plan = self._scheduler.schedule_answer()
        if plan is None:
            return
        (result,) = self._runner.run(plan).chunks
        self.meter.charge_overhead(result.nanoseconds, ANSWERS)
        if result.error is not None:
            log.warning("an answer could not be computed as a prompt: %s", result.error)
        self._scheduler.commit_answer(plan, failed=result.error is not None)

    def check_integrity(self) -> None:
        """Raises AssertionError when books contradict each other. Between steps only."""
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
                    self.step()
                    continue
                self.check_integrity()
                self._rest()
            for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
                self._scheduler.cancel(sequence.group)
        except BaseException as fault:
            log.critical("the engine failed", exc_info=fault)
            self._on_fault(fault)

    def _rest(self) -> None:
        """Until a command comes; after a while, finished answers are computed meanwhile."""
        patience = _PATIENCE_SECONDS
        while not self._wake.wait(patience if self._scheduler.has_answers else None):
            self.prefill_answer()
            patience = 0.0
        self._wake.clear()

    def _post(self, command: Callable[[], list[Update] | None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _drain_inbox(self) -> list[Update]:
        updates: list[Update] = []
        while self._inbox:
            updates += self._inbox.popleft()() or ()
        return updates

    def _stop(self, sequence: Sequence) -> list[Update]:
        if sequence.stage is Stage.FINISHED:
            return []
        self._scheduler.finish(sequence, FinishReason.STOPPED)
        return [Update(sequence.group, sequence, is_finished=True)]

    def _charge(self, step: Step, outcome: Outcome) -> None:
        if outcome.move_nanoseconds:
            self.meter.charge_overhead(outcome.move_nanoseconds, CACHE_MOVES)
        for sequence, chunk, result in zip(
            step.chunks, step.plan.chunks, outcome.chunks, strict=True
        ):
            self.meter.charge(result.nanoseconds, [(sequence, len(chunk.token_ids))])
        if outcome.rows is not None:
            self.meter.charge(outcome.rows.nanoseconds, [(owner, 1) for owner in step.rows])


def _drawing(step: Step, outcome: Outcome) -> Iterator[tuple[Sequence, LogitsRow]]:
    """Who draws a token in this step, and from which logits, float32 [vocabulary]."""
    for sequence in step.forks:
        yield sequence, sequence.group.prompt_logits
    for sequence, result in zip(step.chunks, outcome.chunks, strict=True):
        if result.logits is not None:
            if sequence.generation.n > 1:
                sequence.group.prompt_logits = result.logits[0]
            yield sequence, result.logits[0]
    if outcome.rows is not None and outcome.rows.logits is not None:
        for owner, logits in zip(step.rows, outcome.rows.logits, strict=True):
            if owner is not None:
                yield owner, logits


def _failed_runs(step: Step, outcome: Outcome) -> list[tuple[Sequence, BaseException]]:
    """Everyone who was in a run that failed."""
    failures = []
    for sequence, result in zip(step.chunks, outcome.chunks, strict=True):
        if result.error is not None:
            failures.append((sequence, result.error))
    if outcome.rows is not None and outcome.rows.error is not None:
        error = outcome.rows.error
        failures += [(owner, error) for owner in step.rows if owner is not None]
    return failures
