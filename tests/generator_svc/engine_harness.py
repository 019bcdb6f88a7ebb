"""An engine on a scripted runner that tests step by hand, and a record of what it delivers."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from generator_svc.admission import Admission
from generator_svc.engine import Engine
from generator_svc.kv_cache import SlotCache
from generator_svc.metering import Meter
from generator_svc.scheduler import Scheduler
from generator_svc.sequence import EngineRequest, SamplingParams, SequenceGroup, SequenceUpdate
from tests.fakes import EOS, FixedPrefillCost, ScriptedRunner

GREEDY = SamplingParams(temperature=0)


def _by_index() -> dict[SequenceGroup, dict[int, list[int]]]:
    return defaultdict(lambda: defaultdict(list))


@dataclass
class Harness:
    """An engine and what it delivered.

    `updates` are those delivered, `tokens[group][index]` the tokens in them, and `errors` the
    failures by group.
    """

    slots: int = 4
    slot_length: int = 64
    reuse: bool = True
    prefill_tokens: int = 8
    max_num_batched_tokens: int = 16
    seed: int = 0
    batch_sizes: tuple[int, ...] = ()
    max_prefill_batch_size: int = 0
    min_reused_tokens: int = 2
    runner: Any = None
    max_queued_requests: int = 100
    max_queued_tokens: int = 10_000
    updates: list[SequenceUpdate] = field(default_factory=list)
    tokens: dict[SequenceGroup, dict[int, list[int]]] = field(default_factory=_by_index)
    finished: dict[SequenceGroup, set[int]] = field(default_factory=lambda: defaultdict(set))
    errors: dict[SequenceGroup, BaseException] = field(default_factory=dict)
    faults: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runner = self.runner or ScriptedRunner(self.slots, self.slot_length, seed=self.seed)
        self.meter = Meter()
        self.admission = Admission(self.max_queued_requests, self.max_queued_tokens)
        self.cache = SlotCache(self.slots, self.slot_length, self.reuse, self.min_reused_tokens)
        cost_model = FixedPrefillCost(self.prefill_tokens)
        self.scheduler = Scheduler(
            self.cache,
            cost_model,
            1,
            self.max_num_batched_tokens,
            self.meter.settle,
            self.batch_sizes,
            self.max_prefill_batch_size,
        )
        self.engine = Engine(
            self.scheduler,
            self.runner,
            self.meter,
            self.admission,
            self.deliver,
            self.faults.append,
        )

    def submit(self, prompt: list[int], count: int = 8, **fields: Any) -> SequenceGroup:
        fields.setdefault("sampling", GREEDY)
        fields.setdefault("stop_token_ids", frozenset({EOS}))
        return self.engine.submit(EngineRequest(tuple(prompt), count, **fields))

    def step(self) -> None:
        self.engine.step()
        self.engine.check_integrity()

    def finish(self) -> None:
        """Steps until no work is left, then checks that nothing is still held."""
        self.step()
        while self.scheduler.has_work:
            self.step()
        assert self.cache.used_slots == 0
        assert (self.admission.requests, self.admission.tokens) == (0, 0)

    def deliver(self, updates: list[SequenceUpdate]) -> None:
        """Records the updates of a step."""
        self.updates += updates
        for update in updates:
            group, index = update.group, update.sequence.index
            if update.error is not None:
                self.errors[group] = update.error
            if update.token is not None:
                assert index not in self.finished[group], "a token after the final update"
                self.tokens[group][index].append(update.token.token_id)
            if update.is_finished:
                self.finished[group].add(index)
