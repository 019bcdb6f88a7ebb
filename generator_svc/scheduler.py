"""Decides what the next step computes, and takes in what it brought. Standard library only.

The policy, whole:

    1. Every sequence that decodes gets one token in every step.
    2. Prompts are prefilled in chunks beside it. While anything decodes, a step's chunks take at
       most `stall_nanoseconds`, by what chunks took so far; twice that when two prompts are at
       hand, and so on up to MOST_STRETCH times, for then it is others who would wait. It is the
       one dial: more, and new requests start sooner; less, and running streams stall less. At
       least one tile of tokens is computed, however slow. While nothing decodes, `chunk_tokens`.
    3. First come, first served, among prompts that one step can take. A longer one gets at least
       half of every step's prefill once it is the oldest, and the others share the rest, the
       shortest first: neither waits for all of the other. Of the longer ones, one at a time.
    4. A request is started when a slot is free and its prompt is soon to be computed.
    5. The n sequences of a request share one prefill: the others start when the first has its
       prompt computed, from a copy of its slot and from the same logits.
    6. While there is nothing else to do, finished answers are computed as prompts are, a tile at a
       time, so that the next turn of a conversation finds them in the cache.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from generator_svc.kv_cache import SlotCache
from generator_svc.plan import ATTENTION_TILE, SHORTEST_CHUNK, Chunk, Copy, Row, StepPlan, Swap
from generator_svc.prefill_cost import Pace
from generator_svc.sequence import (
    FinishReason,
    Group,
    SampledToken,
    Sequence,
    Stage,
    Update,
)

MOST_STRETCH = 4
_MOST_LOOKED_UP = 8  # long prompts that wait, in the cache, in a step: it takes time for each
_LEAST_PROGRESS = 2 * SHORTEST_CHUNK  # of any prompt, that many can be cut off


@dataclass(frozen=True)
class Step:
    """A plan and whose it is: `chunks[i]` belongs to plan.chunks[i], `rows[i]` to plan.rows[i].

    `forks` draw their first token from their group's prompt logits and compute nothing.
    """

    plan: StepPlan
    chunks: tuple[Sequence, ...] = ()
    rows: tuple[Sequence | None, ...] = ()
    forks: tuple[Sequence, ...] = ()

    @property
    def is_empty(self) -> bool:
        return self.plan.is_empty and not self.forks


class Scheduler:
    """`stall_nanoseconds` and `chunk_tokens` as in the module's policy.

    `on_finish` hears of every sequence that ended, once, however it did. Decode batches are padded
    with idle rows up to the next of `batch_sizes` (ascending, the last one every slot); without,
    they are as long as they have to be.
    """

    def __init__(
        self,
        cache: SlotCache,
        pace: Pace,
        stall_nanoseconds: int,
        chunk_tokens: int,
        on_finish: Callable[[Sequence], None],
        batch_sizes: tuple[int, ...] = (),
    ) -> None:
        assert chunk_tokens > _LEAST_PROGRESS
        self.cache = cache
        self._pace = pace
        self._on_finish = on_finish
        self._batch_sizes = batch_sizes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._stall_nanoseconds = stall_nanoseconds
        self._chunk_tokens = chunk_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, group: Group) -> None:
        """Queues a request. Only its first sequence: the others wait for its prompt."""
        self.waiting.append(group.sequences[0])

    def schedule(self) -> Step:
        """Admits what there is room for and plans a step; does not run it."""
        moves, forks = self._admit()
        moves += self.cache.compact()
        chunks = self._plan_chunks()
        computed = {s: chunk.start + len(chunk.token_ids) for s, chunk in chunks.items()}
        rows = self._plan_rows(computed)
        owners = tuple(
            None if row.is_idle else self.cache.owner(slot) for slot, row in enumerate(rows)
        )
        plan = StepPlan(tuple(moves), tuple(chunks.values()), rows)
        return Step(plan, tuple(chunks), owners, tuple(forks))

    @property
    def has_answers(self) -> bool:
        """Whether `schedule_answer` would find something to do."""
        return self.cache.next_answer() is not None

    def schedule_answer(self) -> StepPlan | None:
        """Plans to compute some of a finished answer as a prompt; `commit_answer` follows."""
        found = self.cache.next_answer()
        if found is None:
            return None
        slot, start, tokens = found
        length = _chunk_length(len(tokens), ATTENTION_TILE)
        return StepPlan(chunks=(Chunk(slot, start, tuple(tokens[:length]), wants_logits=False),))

    def commit_answer(self, plan: StepPlan, failed: bool) -> None:
        """Takes in what `schedule_answer` planned."""
        (chunk,) = plan.chunks
        self.cache.answer_computed(chunk.slot, 0 if failed else len(chunk.token_ids))

    def observe(self, step: Step, nanoseconds: Iterable[int]) -> None:
        """Learns from what each of a step's chunks took."""
        for chunk, taken in zip(step.plan.chunks, nanoseconds, strict=True):
            self._pace.observe(chunk.start, len(chunk.token_ids), taken)

    def commit(
        self,
        step: Step,
        tokens: Iterable[tuple[Sequence, SampledToken]],
        failures: Iterable[tuple[Sequence, BaseException]] = (),
    ) -> list[Update]:
        """Takes in a step's tokens and failures; what ended has left its slot afterwards."""
        for sequence, chunk in zip(step.chunks, step.plan.chunks, strict=True):
            sequence.computed += len(chunk.token_ids)
        for owner in step.rows:
            if owner is not None:
                owner.computed += 1
        updates = []
        for sequence, error in failures:
            updates += self._fail(sequence.group, error)
        for sequence, token in tokens:
            if sequence.stage is Stage.FINISHED:  # its group failed in this very step
                continue
            if sequence.stage is Stage.PREFILL:
                sequence.stage = Stage.DECODE
                self._start_siblings(sequence.group)
            sequence.append(token.token_id)
            if sequence.finish_reason is not None:
                self.finish(sequence, sequence.finish_reason)
            ended = sequence.stage is Stage.FINISHED
            updates.append(Update(sequence.group, sequence, token, ended))
        return updates

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence wherever it is, and frees what it holds; a second time does nothing."""
        if sequence.stage is Stage.FINISHED:
            return
        if sequence.stage is Stage.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            if reason is FinishReason.FAILED:
                self.cache.forget(sequence)
            else:
                self.cache.release(sequence)
        was_first = sequence.stage in (Stage.WAITING, Stage.PREFILL)
        sequence.stage = Stage.FINISHED
        sequence.finish_reason = reason
        sequence.constraint_state = None
        self._on_finish(sequence)
        group = sequence.group
        if group.is_finished:
            group.permit.release()
            group.prompt_logits = None
        elif was_first and reason is FinishReason.STOPPED:
            self._promote(group)

    def cancel(self, group: Group, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends all sequences of a group."""
        for sequence in group.sequences:
            self.finish(sequence, reason)

    def check_integrity(self) -> None:
        """Raises AssertionError when queue, running sequences and slots contradict each other."""
        self.cache.check_integrity()
        assert len(self.running) == self.cache.used_slots, "a slot has no running sequence"
        assert all(self.cache.owner(s.slot) is s for s in self.running)
        assert all(s.stage is Stage.WAITING for s in self.waiting)

    def _admit(self) -> tuple[list[Copy | Swap], list[Sequence]]:
        """Starts what waits, as long as a step would get to it; returns moves and forks."""
        moves: list[Copy | Swap] = []
        forks = []
        budget = self._budget()
        prefilling = self._prefilling()
        is_long_running = any(s.uncomputed > budget for s in prefilling)
        open_tokens = sum(s.uncomputed for s in prefilling if s.uncomputed <= budget)
        while self.cache.can_allocate() and open_tokens < budget:
            sequence = self._next(budget if is_long_running else None)
            if sequence is None:
                break
            sequence.group.permit.release()
            moves += self.cache.allocate(sequence, _most_cached(sequence))
            self.running.append(sequence)
            sequence.stage = Stage.PREFILL
            if not sequence.uncomputed:
                forks.append(sequence)
            elif sequence.uncomputed > budget:
                is_long_running = True
            else:
                open_tokens += sequence.uncomputed
        return moves, forks

    def _next(self, longest: int | None) -> Sequence | None:
        """Takes the first that waits, or the first with at most `longest` tokens to compute.

        What is cached counts as computed; of long prompts only the first few are looked up.
        """
        lookups = 0
        for position, sequence in enumerate(self.waiting):
            left = 0 if sequence.group.prompt_logits is not None else sequence.prompt_length
            if longest is not None and left > longest and lookups < _MOST_LOOKED_UP:
                left -= self.cache.known_length(sequence, _most_cached(sequence))
                lookups += 1
            if longest is None or left <= longest:
                del self.waiting[position]
                return sequence
        return None

    def _budget(self) -> int:
        """Prompt tokens that a step can take, at the speed of a prompt's beginning."""
        if not any(sequence.stage is Stage.DECODE for sequence in self.running):
            return self._chunk_tokens
        prompts = len(self.waiting) + len(self._prefilling())
        stretch = min(max(prompts, 1), MOST_STRETCH)
        return min(self._pace.fitting(stretch * self._stall_nanoseconds), self._chunk_tokens)

    def _prefilling(self) -> list[Sequence]:
        return [s for s in self.running if s.stage is Stage.PREFILL and s.uncomputed]

    def _plan_chunks(self) -> dict[Sequence, Chunk]:
        """Chunks for this step, by the share of the step that each of them takes."""
        budget = self._budget()
        prefilling = self._prefilling()
        if not prefilling:
            return {}
        oldest, *others = prefilling
        others.sort(key=lambda sequence: sequence.uncomputed)
        chunks: dict[Sequence, Chunk] = {}
        if oldest.uncomputed > budget:
            left = self._add_chunks(chunks, others, budget / 2) + budget / 2
            self._add_chunks(chunks, [oldest], left)
        else:
            self._add_chunks(chunks, [oldest, *others], budget)
        return chunks

    def _add_chunks(
        self, chunks: dict[Sequence, Chunk], sequences: list[Sequence], budget: float
    ) -> float:
        """Adds a chunk for each of `sequences` that fits; returns what is left of `budget`.

        The budget counts tokens at a prompt's beginning; later ones take more of it.
        """
        for sequence in sequences:
            weight = max(self._pace.cost(sequence.computed) / self._pace.cost(0), 1.0)
            most = int(budget / weight)
            if not chunks:  # however slow, a step gets on
                most = max(most, _LEAST_PROGRESS)
            length = _chunk_length(sequence.uncomputed, most)
            if not length:
                break
            budget -= length * weight
            start = sequence.computed
            tokens = tuple(sequence.token_ids[start : start + length])
            chunks[sequence] = Chunk(sequence.slot, start, tokens, length == sequence.uncomputed)
        return max(budget, 0.0)

    def _plan_rows(self, computed: dict[Sequence, int]) -> tuple[Row, ...]:
        decoding = {s.slot: s for s in self.running if s.stage is Stage.DECODE}
        rows = []
        for slot in range(self._padded(max(decoding, default=-1) + 1)):
            sequence = decoding.get(slot)
            if sequence is not None:
                is_greedy = sequence.is_greedy
                rows.append(Row(sequence.token_ids[-1], sequence.computed, is_greedy=is_greedy))
                continue
            owner = self.cache.owner(slot)
            position = self.cache.idle_position(slot)
            if owner is not None:  # in prefill: a chunk of this step may run before
                position = computed.get(owner, position)
            rows.append(Row(0, position, is_idle=True))
        return tuple(rows)

    def _padded(self, rows: int) -> int:
        return next((size for size in self._batch_sizes if size >= rows), rows) if rows else 0

    def _start_siblings(self, group: Group) -> None:
        """Lets those start that wait for the prompt; without any left its logits are done with."""
        waiting = [s for s in group.sequences if s.stage is Stage.WAITING and s not in self.waiting]
        self.waiting.extendleft(reversed(waiting))
        if all(s.stage in (Stage.DECODE, Stage.FINISHED) for s in group.sequences):
            group.prompt_logits = None

    def _promote(self, group: Group) -> None:
        """The first sequence ended before its prompt was computed: the next one does that."""
        if group.prompt_logits is not None:
            return
        queued = any(s.stage is Stage.PREFILL or s in self.waiting for s in group.sequences)
        if not queued:
            following = next(s for s in group.sequences if s.stage is Stage.WAITING)
            self.waiting.appendleft(following)

    def _fail(self, group: Group, error: BaseException) -> list[Update]:
        if group.is_finished:
            return []
        self.cancel(group, FinishReason.FAILED)
        return [Update(group, group.sequences[0], is_finished=True, error=error)]


def _most_cached(sequence: Sequence) -> int:
    """Tokens that may be taken from the cache: a prompt's end is computed anew, for its logits,
    unless these are kept."""
    has_logits = sequence.group.prompt_logits is not None
    return max(sequence.prompt_length - (0 if has_logits else SHORTEST_CHUNK), 0)


def _chunk_length(uncomputed: int, most: int) -> int:
    """Tokens to compute now: as many as fit, none of them alone in its tile, nor one left over."""
    if uncomputed == 1:
        return min(1, most)
    for length in range(min(uncomputed, most), SHORTEST_CHUNK - 1, -1):
        if length % ATTENTION_TILE != 1 and uncomputed - length != 1:
            return length
    return 0
