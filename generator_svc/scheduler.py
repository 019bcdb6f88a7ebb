"""Plans each step and applies its results. Standard library only.

The whole policy:

    1. Every decoding sequence gets one token in every step.
    2. Prompts are prefilled in chunks in the same step. While sequences decode, prefill per step is
       limited to `stall_nanoseconds`, times the ratio of pending prompts to decoding sequences if
       that is above 1, up to MAX_STALL_MULTIPLIER. This is the only tuning knob: higher lowers
       TTFT, lower shortens inter-token stalls. Prefill gets at least one attention tile per step,
       however slow the device. `max_num_batched_tokens` bounds all tokens of a step.
    3. With `max_prefill_batch_size`, whole prompts of similar length in consecutive slots are
       prefilled in one run, padded to one of a few lengths. To get large batches, prompts admitted
       together get adjacent slots in the order of their lengths, and no prompt is split merely to
       use up a step's budget.
    4. Prompts that fit into one step are served first come, first served. A longer prompt, once it
       is the oldest, gets at least half of every step's prefill budget; the others share the rest,
       shortest first, so that neither starves the other. Only one long prompt runs at a time.
    5. A request is admitted when a slot is free and its prompt would be computed soon.
    6. The n sequences of a request share one prefill: once the first has computed its prompt, the
       others start from a copy of its slot and from the same logits.
    7. While idle, finished answers are re-prefilled, one tile at a time, so that the next turn of a
       conversation hits the prefix cache.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from generator_svc.kv_cache import SlotCache
from generator_svc.plan import (
    ATTENTION_TILE,
    MIN_CHUNK_TOKENS,
    Chunk,
    Copy,
    Row,
    StepPlan,
    Swap,
)
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.prefill_planner import PrefillPlanner, chunk_length
from generator_svc.prompt_batches import padded_length, take_batches
from generator_svc.sequence import (
    FinishReason,
    SampledToken,
    Sequence,
    SequenceGroup,
    SequenceStatus,
    SequenceUpdate,
)

# Each lookup compares a long waiting prompt against every slot.
_MAX_PREFIX_LOOKUPS_PER_STEP = 8


@dataclass(frozen=True)
class ScheduledStep:
    """A plan and its sequences: `chunks[i]` owns plan.chunks[i], `rows[i]` owns plan.rows[i].

    `batches[i]` owns the prompts of plan.batches[i], in the same order.
    `forks` sample their first token from their group's prompt logits and compute nothing.
    """

    plan: StepPlan
    chunks: tuple[Sequence, ...] = ()
    rows: tuple[Sequence | None, ...] = ()
    forks: tuple[Sequence, ...] = ()
    batches: tuple[tuple[Sequence, ...], ...] = ()


class Scheduler:
    """Owns the waiting queue, the running sequences and the slots; for the engine's thread.

    `stall_nanoseconds` and `max_num_batched_tokens`: see the module's policy. `on_finish` is called
    once for every sequence that ends, for whatever reason. Decode batches are padded with idle rows
    to the next of `batch_sizes` (ascending, the last equal to the number of slots); if it is empty,
    only up to the highest decoding slot. If `max_prefill_batch_size` is 0, each prompt is prefilled
    on its own and without padding.
    """

    def __init__(
        self,
        cache: SlotCache,
        prefill_cost: PrefillCostModel,
        stall_nanoseconds: int,
        max_num_batched_tokens: int,
        on_finish: Callable[[Sequence], None],
        batch_sizes: tuple[int, ...] = (),
        max_prefill_batch_size: int = 0,
    ) -> None:
        self.cache = cache
        self.prefill_cost = prefill_cost
        self._planner = PrefillPlanner(
            prefill_cost,
            stall_nanoseconds,
            max_num_batched_tokens,
            keeps_whole=bool(max_prefill_batch_size),
        )
        self._on_finish = on_finish
        self._batch_sizes = batch_sizes
        self._max_prefill_batch_size = max_prefill_batch_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_num_batched_tokens = max_num_batched_tokens

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    def add(self, group: SequenceGroup) -> None:
        """Queues a request's first sequence; the others wait until it has computed the prompt."""
        self.waiting.append(group.sequences[0])

    def schedule(self) -> ScheduledStep:
        """Admits waiting requests and plans a step, without running it."""
        moves, forks = self._admit() if self.waiting else ([], [])
        moves += self.cache.compact()
        prefilling = self._prefilling()
        chunks = self._planner.plan(prefilling, self._budget(prefilling)) if prefilling else {}
        computed = {s: chunk.start + len(chunk.token_ids) for s, chunk in chunks.items()}
        rows, owners = self._plan_rows(computed)
        batches = {}
        if self._max_prefill_batch_size:
            max_positions = padded_length(self._max_num_batched_tokens)
            length = self.cache.slot_length
            batches = take_batches(chunks, self._max_prefill_batch_size, max_positions, length)
        plan = StepPlan(tuple(moves), tuple(chunks.values()), rows, tuple(batches.values()))
        return ScheduledStep(plan, tuple(chunks), owners, tuple(forks), tuple(batches))

    @property
    def has_reprefills(self) -> bool:
        """Whether an answer is pending for `schedule_reprefill`."""
        return self.cache.next_reprefill() is not None

    def schedule_reprefill(self) -> StepPlan | None:
        """Plans to re-prefill a tile of a finished answer, to be followed by `commit_reprefill`."""
        pending = self.cache.next_reprefill()
        if pending is None:
            return None
        slot, start, tokens = pending
        length = chunk_length(len(tokens), ATTENTION_TILE)
        return StepPlan(chunks=(Chunk(slot, start, tuple(tokens[:length]), wants_logits=False),))

    def commit_reprefill(self, plan: StepPlan, failed: bool) -> None:
        """Applies the result of a plan from `schedule_reprefill`."""
        (chunk,) = plan.chunks
        self.cache.reprefilled(chunk.slot, 0 if failed else len(chunk.token_ids))

    def observe(self, step: ScheduledStep, nanoseconds: Iterable[int | None]) -> None:
        """Feeds the measured times of a step's batches and chunks, in this order, to the cost
        model."""
        runs = [(0, sum(map(len, batch.prompts))) for batch in step.plan.batches]
        runs += [(chunk.start, len(chunk.token_ids)) for chunk in step.plan.chunks]
        for (start, tokens), elapsed in zip(runs, nanoseconds, strict=True):
            if elapsed is not None:
                self.prefill_cost.observe(start, tokens, elapsed)

    def commit(
        self,
        step: ScheduledStep,
        tokens: Iterable[tuple[Sequence, SampledToken]],
        failures: Iterable[tuple[Sequence, BaseException]] = (),
    ) -> list[SequenceUpdate]:
        """Applies a step's tokens and failures; frees the slots of sequences that end here."""
        for sequence, chunk in zip(step.chunks, step.plan.chunks, strict=True):
            sequence.computed += len(chunk.token_ids)
        for sequence in itertools.chain.from_iterable(step.batches):
            sequence.computed = sequence.prompt_length
        for owner in step.rows:
            if owner is not None:
                owner.computed += 1
        updates = []
        for sequence, error in failures:
            updates += self._fail(sequence.group, error)
        decode = SequenceStatus.DECODE
        for sequence, token in tokens:
            group = sequence.group
            is_urgent = False
            if sequence.status is not decode:
                if sequence.status is SequenceStatus.FINISHED:  # its group failed in this step
                    continue
                sequence.status = decode
                self._start_siblings(group)
                is_urgent = True
            reason = sequence.append(token.token_id)
            if reason is None:
                update = SequenceUpdate(group, sequence, token, False, None, is_urgent)
            else:
                self.finish(sequence, reason)
                update = SequenceUpdate(group, sequence, token, True)
            updates.append(update)
        return updates

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in any status and releases what it holds; idempotent."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            if reason is FinishReason.FAILED:
                self.cache.discard(sequence)
            else:
                self.cache.release(sequence)
        was_first = sequence.status in (SequenceStatus.WAITING, SequenceStatus.PREFILL)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.constraint_state = None
        self._on_finish(sequence)
        group = sequence.group
        if group.is_finished:
            group.permit.release()
            group.prompt_logits = None
        elif was_first and reason is FinishReason.STOPPED:
            self._promote(group)

    def cancel(self, group: SequenceGroup, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends all sequences of a group."""
        for sequence in group.sequences:
            self.finish(sequence, reason)

    def check_integrity(self) -> None:
        """Raises AssertionError if queue, running sequences and slots are inconsistent."""
        self.cache.check_integrity()
        assert len(self.running) == self.cache.used_slots, "a slot has no running sequence"
        assert all(self.cache.owner(s.slot) is s for s in self.running)
        assert all(s.status is SequenceStatus.WAITING for s in self.waiting)

    def _admit(self) -> tuple[list[Copy | Swap], list[Sequence]]:
        """Admits waiting sequences whose prompts a step would reach; returns moves and forks."""
        moves: list[Copy | Swap] = []
        forks = []
        prefilling = self._prefilling()
        budget = self._budget(prefilling)
        # At most one prompt above the budget runs, so that short ones keep getting their share.
        is_long_running = any(s.uncomputed > budget for s in prefilling)
        pending_tokens = sum(s.uncomputed for s in prefilling if s.uncomputed <= budget)
        if self._max_prefill_batch_size and len(self.waiting) > 1 and pending_tokens < budget:
            moves += self.cache.defragment()
        while self.cache.can_allocate() and pending_tokens < budget:
            sequence = self._next(budget if is_long_running else math.inf)
            if sequence is None:
                break
            group = sequence.group
            group.permit.release()
            if group.scheduled_at is None:
                group.scheduled_at = time.monotonic()
            moves += self.cache.allocate(sequence, _max_cached(sequence))
            self.running.append(sequence)
            sequence.status = SequenceStatus.PREFILL
            if not sequence.uncomputed:
                forks.append(sequence)
            elif sequence.uncomputed > budget:
                is_long_running = True
            else:
                pending_tokens += sequence.uncomputed
        if self._max_prefill_batch_size:
            fresh = (s for s in self._prefilling() if not s.computed)
            self.cache.assign_in_order(sorted(fresh, key=lambda s: s.prompt_length))
        return moves, forks

    def _next(self, max_tokens: float) -> Sequence | None:
        """Dequeues the first waiting sequence with at most `max_tokens` tokens to compute, if any.

        Cached tokens do not count, but only the first few long prompts are looked up in the cache.
        """
        lookups = 0
        for position, sequence in enumerate(self.waiting):
            left = 0 if sequence.group.prompt_logits is not None else sequence.prompt_length
            if left > max_tokens and lookups < _MAX_PREFIX_LOOKUPS_PER_STEP:
                left -= self.cache.cached_prefix_length(sequence, _max_cached(sequence))
                lookups += 1
            if left <= max_tokens:
                del self.waiting[position]
                return sequence
        return None

    def _budget(self, prefilling: list[Sequence]) -> int:
        """Prompt tokens that this step may prefill."""
        decoding = sum(sequence.status is SequenceStatus.DECODE for sequence in self.running)
        return self._planner.budget(decoding, len(self.waiting) + len(prefilling))

    def _prefilling(self) -> list[Sequence]:
        prefill = SequenceStatus.PREFILL
        return [s for s in self.running if s.status is prefill and s.uncomputed]

    def _plan_rows(
        self, computed: dict[Sequence, int]
    ) -> tuple[tuple[Row, ...], tuple[Sequence | None, ...]]:
        """This step's decode rows and the sequence of each; None for idle rows."""
        decode = SequenceStatus.DECODE
        decoding = {s.slot: s for s in self.running if s.status is decode}
        rows = []
        count = max(decoding, default=-1) + 1
        if count:  # padded to a captured batch size
            count = next((size for size in self._batch_sizes if size >= count), count)
        owners = tuple(map(decoding.get, range(count)))
        for slot, sequence in enumerate(owners):
            if sequence is not None:
                temperature = sequence.row_temperature
                rows.append(Row(sequence.token_ids[-1], sequence.computed, False, temperature))
                continue
            owner = self.cache.owner(slot)
            position = self.cache.idle_position(slot)
            if owner is not None:  # prefilling: its chunk of this step runs before the decode rows
                position = computed.get(owner, position)
            rows.append(Row(0, position, is_idle=True))
        return tuple(rows), owners

    def _start_siblings(self, group: SequenceGroup) -> None:
        """Queues the sequences that waited for the prompt; frees its logits once all have sampled
        from them."""
        waiting = [s for s in group.sequences if s.status is SequenceStatus.WAITING]
        waiting = [s for s in waiting if s not in self.waiting]
        self.waiting.extendleft(reversed(waiting))
        has_drawn = (SequenceStatus.DECODE, SequenceStatus.FINISHED)
        if all(s.status in has_drawn for s in group.sequences):
            group.prompt_logits = None

    def _promote(self, group: SequenceGroup) -> None:
        """Lets another sequence prefill the prompt after the first was stopped before doing so."""
        if group.prompt_logits is not None:
            return
        prefill = SequenceStatus.PREFILL
        if not any(s.status is prefill or s in self.waiting for s in group.sequences):
            following = next(s for s in group.sequences if s.status is SequenceStatus.WAITING)
            self.waiting.appendleft(following)

    def _fail(self, group: SequenceGroup, error: BaseException) -> list[SequenceUpdate]:
        if group.is_finished:
            return []
        self.cancel(group, FinishReason.FAILED)
        return [SequenceUpdate(group, group.sequences[0], is_finished=True, error=error)]


def _max_cached(sequence: Sequence) -> int:
    """The maximum number of tokens that may come from the prefix cache.

    The end of a prompt is always computed, for its logits, unless the group still has them. If
    log-probabilities of the prompt are requested, all of it is computed.
    """
    if sequence.scores_prompt:
        return 0
    has_logits = sequence.group.prompt_logits is not None
    return max(sequence.prompt_length - (0 if has_logits else MIN_CHUNK_TOKENS), 0)
