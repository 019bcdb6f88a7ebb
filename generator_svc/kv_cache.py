"""The KV cache's bookkeeping: which slot holds which tokens, and for which sequence. No tensors.

The states of a slot:

    owned by a sequence    holds its tokens so far; other sequences may copy a prefix, but not write
    free, with content     holds the prefilled tokens of a finished sequence: the prefix cache,
                           evicted in LRU order. The answer is kept as token ids only
    free, empty            available to any sequence

Only prefilled tokens are reused. The tokens of an answer were computed one at a time, by decode
kernels whose rounding differs from that of the prefill kernels that would compute them as part of
the next prompt, so reusing them would make a request's tokens depend on the state of the cache.
Instead, finished answers are re-prefilled while the engine is idle, so that the next turn hits the
prefix cache; `next_reprefill` returns what is pending.

Decode runs over a contiguous range of slots, so active slots are kept at the low end: a new
sequence takes the lowest free slot, whose content moves to the least recently used free slot. A
slot freed inside the range remains as an idle row until a new sequence takes it or, after
COMPACT_AFTER_IDLE_STEPS steps, the last active slot is moved into it.
"""

import itertools
from dataclasses import dataclass, field

from generator_svc.plan import MIN_CHUNK_TOKENS, Copy, Swap
from generator_svc.sequence import Sequence

# An idle row costs about a quarter of swapping two slots, so compact after four steps.
COMPACT_AFTER_IDLE_STEPS = 4
# Only for the most recent conversations, which are the most likely to have another turn soon.
MAX_PENDING_REPREFILLS = 4


@dataclass
class _Slot:
    tokens: list[int] = field(default_factory=list)  # the content of a free slot
    answer: list[int] = field(default_factory=list)  # follows `tokens`, to be re-prefilled
    owner: Sequence | None = None
    last_used: int = 0
    idle_steps: int = 0

    @property
    def length(self) -> int:
        """Tokens whose keys and values the slot holds."""
        return len(self.tokens) if self.owner is None else self.owner.computed

    @property
    def reusable(self) -> int:
        """Tokens whose keys and values another sequence may copy: the prefilled ones."""
        if self.owner is None:
            return len(self.tokens)
        return min(self.owner.computed, self.owner.prompt_length)


class SlotCache:
    """`num_slots` slots of `slot_length` tokens each.

    Without `reuse`, finished sequences leave nothing in the cache, and prefixes are shared only
    among the sequences of a request. Prefixes shorter than `min_reused_tokens` are not reused,
    unless the request's prompt has been computed already, and shorter content is not kept. Methods
    that move content return the moves, which must be executed in order before the next run.
    """

    def __init__(
        self,
        num_slots: int,
        slot_length: int,
        reuse: bool = True,
        min_reused_tokens: int = MIN_CHUNK_TOKENS,
    ) -> None:
        assert num_slots > 0
        assert slot_length > 1
        assert min_reused_tokens >= MIN_CHUNK_TOKENS
        self.num_slots = num_slots
        self.slot_length = slot_length
        self.reuse = reuse
        self._min_reused_tokens = min_reused_tokens
        self._slots = [_Slot() for _ in range(num_slots)]
        self._clock = itertools.count(1)

    @property
    def used_slots(self) -> int:
        """Slots that a sequence owns."""
        return sum(slot.owner is not None for slot in self._slots)

    @property
    def used_tokens(self) -> int:
        """Tokens whose keys and values are held by sequences, not counting the prefix cache, which
        can be evicted at any time."""
        owners = [slot.owner for slot in self._slots]  # one snapshot: other threads call this too
        return sum(owner.computed for owner in owners if owner is not None)

    @property
    def active_range(self) -> int:
        """One more than the highest owned slot; 0 if there is none."""
        owned = (n for n in range(len(self._slots), 0, -1) if self._slots[n - 1].owner is not None)
        return next(owned, 0)

    def owner(self, slot: int) -> Sequence | None:
        """The sequence that owns a slot; None if it is free."""
        return self._slots[slot].owner

    def kept_tokens(self, slot: int) -> list[int]:
        """The tokens whose keys and values a free slot keeps; empty for an owned slot."""
        return self._slots[slot].tokens

    def idle_position(self, slot: int) -> int:
        """The position at which an idle row of `slot` may write: just after the slot's content."""
        return self._slots[slot].length

    def can_allocate(self) -> bool:
        """Whether a slot is free, so that `allocate` may be called."""
        return any(slot.owner is None for slot in self._slots)

    def cached_prefix_length(self, sequence: Sequence, max_tokens: int) -> int:
        """How many tokens `allocate` would reuse from the cache now."""
        return self._longest_prefix(sequence, max_tokens)[1]

    def allocate(self, sequence: Sequence, max_tokens: int) -> list[Copy | Swap]:
        """Gives `sequence` a slot with the longest cached prefix of its tokens; returns the moves.

        Reuses at most `max_tokens` tokens, never a single one, and never leaves a single one to
        compute, since a chunk of one token rounds differently. Sets the sequence's `slot`,
        `computed` and `cached_prompt_tokens`.
        """
        assert sequence.slot < 0
        assert len(sequence.token_ids) <= self.slot_length
        target = next(n for n, slot in enumerate(self._slots) if slot.owner is None)
        source, length = self._longest_prefix(sequence, max_tokens)
        moves = self._copy_prefix_into(source, target, length)
        self._slots[target] = _Slot(owner=sequence, last_used=next(self._clock))
        sequence.slot = target
        sequence.computed = sequence.cached_prompt_tokens = length
        return moves

    def release(self, sequence: Sequence) -> None:
        """Frees the sequence's slot, whose prefilled tokens stay in the prefix cache."""
        slot = self._slots[sequence.slot]
        assert slot.owner is sequence, "a slot is released by a sequence that does not own it"
        kept = slot.reusable if self.reuse else 0
        slot.tokens = sequence.token_ids[:kept]
        if kept == sequence.prompt_length:
            # One position stays free: an idle row of this slot writes just after its content.
            slot.answer = sequence.token_ids[kept : self.slot_length - 1]
        if len(slot.tokens) + len(slot.answer) < self._min_reused_tokens:
            slot.tokens = slot.answer = []
        slot.owner = None
        slot.last_used = next(self._clock)
        sequence.slot = -1
        for number in self._pending_reprefills()[:-MAX_PENDING_REPREFILLS]:
            self._slots[number].answer = []

    def next_reprefill(self) -> tuple[int, int, list[int]] | None:
        """The next answer to re-prefill: its slot, start position and token ids.

        The most recently used slot comes first; None if nothing is pending.
        """
        numbers = self._pending_reprefills()
        if not numbers:
            return None
        slot = self._slots[numbers[-1]]
        return numbers[-1], slot.length, slot.answer

    def reprefilled(self, number: int, count: int) -> None:
        """Records that the next `count` tokens of a slot's answer were prefilled: they are content.

        0 means that the run failed: the rest of the answer is dropped.
        """
        slot = self._slots[number]
        slot.tokens = slot.tokens + slot.answer[:count]
        slot.answer = slot.answer[count:] if count else []

    def discard(self, sequence: Sequence) -> None:
        """Frees the slot of a failed sequence and drops its content, which cannot be trusted."""
        slot = self._slots[sequence.slot]
        assert slot.owner is sequence
        self._slots[sequence.slot] = _Slot()
        sequence.slot = -1

    def compact(self) -> list[Copy | Swap]:
        """Fills at most one gap in the active range, once it has been idle long enough.

        Called once per step.
        """
        last = self.active_range - 1
        moves: list[Copy | Swap] = []
        for number, slot in enumerate(self._slots[: max(last, 0)]):
            if slot.owner is not None:
                continue
            slot.idle_steps += 1
            if slot.idle_steps > COMPACT_AFTER_IDLE_STEPS and not moves:
                moves.append(self._exchange(number, last))
        return moves

    def defragment(self) -> list[Copy | Swap]:
        """Fills all gaps in the active range, so that the free slots after it are contiguous."""
        return [
            self._exchange(number, self.active_range - 1)
            for number in range(self.used_slots)
            if self._slots[number].owner is None
        ]

    def assign_in_order(self, sequences: list[Sequence]) -> None:
        """Reassigns the slots of `sequences` among them, in ascending order.

        None of them has computed any tokens yet, so no keys or values have to be moved.
        """
        for sequence, number in zip(sequences, sorted(s.slot for s in sequences), strict=True):
            assert not sequence.computed
            sequence.slot = number
            self._slots[number].owner = sequence

    def check_integrity(self) -> None:
        """Raises AssertionError if the bookkeeping is inconsistent."""
        for number, slot in enumerate(self._slots):
            if slot.owner is not None:
                assert slot.owner.slot == number, f"slot {number} has an owner with another slot"
                assert not slot.tokens, f"slot {number} has an owner and content of its own"
                assert slot.owner.computed <= len(slot.owner.token_ids) <= self.slot_length
            assert slot.owner is None or not slot.answer, (
                f"slot {number} is owned and has an answer"
            )
            assert slot.length <= self.slot_length
            assert slot.owner is not None or slot.length + len(slot.answer) < self.slot_length

    def _pending_reprefills(self) -> list[int]:
        """Free slots with enough tokens of an answer to re-prefill, most recently used last."""
        numbers = (n for n, slot in enumerate(self._slots) if len(slot.answer) >= MIN_CHUNK_TOKENS)
        return sorted(numbers, key=lambda number: self._slots[number].last_used)

    def _longest_prefix(self, sequence: Sequence, max_tokens: int) -> tuple[int, int]:
        """The slot with the longest usable prefix of `sequence`, and the prefix's length.

        (-1, 0) if no slot has enough of it.
        """
        tokens = sequence.token_ids
        longest = min(max_tokens, len(tokens))
        source, best = -1, MIN_CHUNK_TOKENS - 1
        for number, slot in enumerate(self._slots):
            owner = slot.owner
            content = slot.tokens if owner is None else owner.token_ids
            # For most slots, comparing the one token that would make theirs the longest is enough.
            if len(content) <= best or best >= longest or content[best] != tokens[best]:
                continue
            if not self.reuse and (owner is None or owner.group is not sequence.group):
                continue
            length = _common_prefix(content, tokens, min(longest, slot.reusable))
            if length > best:
                source, best = number, length
        # Never leave a single token to compute: its chunk would round differently.
        if best < len(tokens):
            best = min(best, len(tokens) - MIN_CHUNK_TOKENS)
        has_logits = sequence.group.prompt_logits is not None
        enough = MIN_CHUNK_TOKENS if has_logits else self._min_reused_tokens
        return (source, best) if best >= enough else (-1, 0)

    def _copy_prefix_into(self, source: int, target: int, length: int) -> list[Copy | Swap]:
        """Moves that put the first `length` tokens of `source` into the free slot `target`.

        The content of `target` is kept if another free slot was used less recently.
        """
        if length and source == target:
            if length * 2 >= self._slots[target].length:
                return []
            # Most of the content is not part of this prompt, so keep a copy of it.
            return self._preserve_evicted(target, keep=target)
        # Most of a free source is reused: exchanging the slots keeps the target's content without
        # evicting a third slot.
        is_free = length > 0 and self._slots[source].owner is None
        if is_free and length * 2 >= self._slots[source].length:
            return [self._exchange(source, target)]
        moves = self._preserve_evicted(target, keep=source)
        if length:
            self._slots[source].last_used = next(self._clock)
            moves.append(Copy(source, target, length))
        return moves

    def _preserve_evicted(self, number: int, keep: int) -> list[Copy | Swap]:
        """Copies a free slot's content to the LRU free slot, unless that was used more recently.

        Slot `keep` is never overwritten.
        """
        slot = self._slots[number]
        if not slot.tokens:
            return []
        others = [
            (other.last_used if other.tokens else 0, position)
            for position, other in enumerate(self._slots)
            if other.owner is None and position not in (number, keep)
        ]
        if not others:
            return []
        last_used, victim = min(others)
        if last_used > slot.last_used:
            return []
        self._slots[victim] = _Slot(slot.tokens, slot.answer, last_used=slot.last_used)
        return [Copy(number, victim, len(slot.tokens))]

    def _exchange(self, first: int, second: int) -> Copy | Swap:
        """Exchanges two slots; a copy suffices if one of them is empty."""
        slots = self._slots
        lengths = slots[first].length, slots[second].length
        slots[first], slots[second] = slots[second], slots[first]
        for number in (first, second):
            slots[number].idle_steps = 0
            owner = slots[number].owner
            if owner is not None:
                owner.slot = number
        if not lengths[0]:
            return Copy(second, first, lengths[1])
        if not lengths[1]:
            return Copy(first, second, lengths[0])
        return Swap(first, second, max(lengths))


def _common_prefix(left: list[int], right: list[int], limit: int) -> int:
    """Length of the common prefix, at most `limit`.

    Compares slices, which runs in C: slices of doubling length up to the first that differs, which
    is then bisected.
    """
    limit = min(limit, len(left), len(right))
    low, step = 0, 32
    while low < limit and left[low : (high := min(low + step, limit))] == right[low:high]:
        low, step = high, 2 * step
    if low == limit:
        return limit
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
