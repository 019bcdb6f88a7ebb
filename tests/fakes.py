"""Fakes that trigger rare events on demand, with simple bookkeeping to compare with."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from generator_svc.plan import Copy, PromptBatch, StepPlan, Swap
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.run.logits_buffers import Logits
from generator_svc.run.outcome import RunResult, StepOutcome

VOCABULARY = 64
EOS = 1


def next_token(context: Sequence[int]) -> int:
    """The scripted model's most likely token, which depends on the whole context."""
    value = 0
    for token in context:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCABULARY


def scripted_logits(context: Sequence[int]) -> Logits:
    """Logits, float32 [VOCABULARY], that depend on the whole context; `next_token` is on top."""
    generator = np.random.default_rng([len(context), *context])
    logits = generator.normal(size=VOCABULARY).astype(np.float32)
    logits[next_token(context)] = 6.0
    return logits


def greedy(prompt: Sequence[int], count: int, eos: int | None = EOS) -> list[int]:
    """The scripted model's greedy answer."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context))
        if context[-1] == eos:
            break
    return context[len(prompt) :]


class FixedPrefillCost(PrefillCostModel):
    """Each nanosecond has room for `tokens` of any prompt, whatever was measured."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def cost(self, start: int) -> float:
        return 1.0

    def tokens_within(self, nanoseconds: float) -> int:
        return int(self._tokens * nanoseconds)


class ScriptedRunner:
    """A runner whose cache holds token ids, so that a bookkeeping error changes the answer.

    `fails` is called before each run with its slots, and may return an error to report. `plans` has
    all plans, and `busy` the total of the random run times in nanoseconds.
    """

    def __init__(
        self,
        slots: int,
        slot_length: int,
        logits: Callable[[Sequence[int]], Logits] = scripted_logits,
        seed: int = 0,
    ) -> None:
        self.memory = [[-1] * slot_length for _ in range(slots)]
        self.plans: list[StepPlan] = []
        self.busy = 0
        self.fails: Callable[[list[int]], BaseException | None] = lambda slots: None
        self._logits = logits
        self._random = random.Random(seed)

    @property
    def prefilled_tokens(self) -> int:
        """Prefilled tokens without padding."""
        chunks = [len(chunk.token_ids) for plan in self.plans for chunk in plan.chunks]
        batches = [batch for plan in self.plans for batch in plan.batches]
        return sum(chunks) + sum(len(prompt) for batch in batches for prompt in batch.prompts)

    def run(self, plan: StepPlan) -> StepOutcome:
        self.plans.append(plan)
        for move in plan.moves:
            self._move(move)
        batches = [self._compute_prompts(batch) for batch in plan.batches]
        chunks = []
        for chunk in plan.chunks:
            places = range(chunk.start, chunk.start + len(chunk.token_ids))
            entries = [
                (chunk.slot, place, token)
                for place, token in zip(places, chunk.token_ids, strict=True)
            ]
            result = self._compute([entries])
            if chunk.wants_all_logits and result.error is None:
                contexts = (self.memory[chunk.slot][: place + 1] for place in places)
                result = replace(result, all_logits=np.stack([*map(self._logits, contexts)]))
            chunks.append(result if chunk.wants_logits else replace(result, logits=None))
        rows = None
        if plan.rows:
            rows = self._compute(
                [[(slot, row.position, row.token_id)] for slot, row in enumerate(plan.rows)]
            )
        moves = self._time() if plan.moves else 0
        return StepOutcome(moves, tuple(chunks), rows, tuple(batches))

    def _time(self) -> int:
        nanoseconds = self._random.randrange(1, 10_000_019)
        self.busy += nanoseconds
        return nanoseconds

    def _compute_prompts(self, batch: PromptBatch) -> RunResult:
        """Overwrites the memory under the padding, like the real runner."""
        rows = []
        for slot, prompt in enumerate(batch.prompts, start=batch.first_slot):
            self.memory[slot][: batch.length] = [0] * batch.length
            rows.append([(slot, place, token) for place, token in enumerate(prompt)])
        return self._compute(rows)

    def _compute(self, rows: list[list[tuple[int, int, int]]]) -> RunResult:
        error = self.fails([entries[0][0] for entries in rows])
        if error is not None:
            return RunResult(self._time(), error=error)
        logits = []
        for entries in rows:
            for slot, place, token in entries:
                self.memory[slot][place] = token
            slot, place, _ = entries[-1]
            logits.append(self._logits(self.memory[slot][: place + 1]))
        return RunResult(self._time(), np.stack(logits))

    def _move(self, move: Copy | Swap) -> None:
        length = move.length
        if isinstance(move, Copy):
            self.memory[move.target][:length] = self.memory[move.source][:length]
            return
        one, other = self.memory[move.first], self.memory[move.second]
        one[:length], other[:length] = other[:length], one[:length]
