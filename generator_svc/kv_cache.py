"""Which slot holds which tokens' keys and values, and for whom: bookkeeping only, no tensors.

A slot's content, and who may do what with it:

    owned by a sequence    its tokens so far; others may copy a prefix, nobody may overwrite it
    free, with content     what a finished sequence left: the prefix cache; least recently used
                           goes first. Its answer is remembered as mere tokens
    free, empty            for anyone

Only a prompt's tokens are reused. Those of an answer were computed one by one, by kernels that
round differently from those that would compute them as part of the next prompt, so taking them
would make a request's tokens depend on what was cached. What may be taken of an answer is what has
been computed anew, as a prompt's is: `next_answer` says what is left of that to do.

Active slots are kept at the low end, since decode runs over a contiguous range of them: a new
sequence takes the lowest free slot, whose content moves to the least valuable free one. A slot
freed inside the range stays there as an idle row until a newcomer takes it, or, after
HOLE_PATIENCE steps, the last active slot is swapped into it.
"""

import itertools
from dataclasses import dataclass, field

from generator_svc.plan import SHORTEST_CHUNK, Copy, Swap
from generator_svc.sequence import Sequence

# An idle row costs about a fourth of what swapping two slots does, so wait that many steps.
HOLE_PATIENCE = 4
# Of so many finished sequences the answers are remembered: those that may soon go on.
MOST_ANSWERS = 4


@dataclass
class _Slot:
    tokens: list[int] = field(default_factory=list)  # the content of a free slot
    answer: list[int] = field(default_factory=list)  # what came after it, to be computed anew
    owner: Sequence | None = None
    last_used: int = 0
    idle_steps: int = 0

    @property
    def content(self) -> list[int]:
        if self.owner is None:
            return self.tokens
        return self.owner.token_ids

    @property
    def length(self) -> int:
        """Tokens that have keys and values."""
        return len(self.tokens) if self.owner is None else self.owner.computed

    @property
    def reusable(self) -> int:
        """Tokens whose keys and values another sequence may take: those of the prompt."""
        if self.owner is None:
            return len(self.tokens)
        return min(self.owner.computed, self.owner.prompt_length)


class SlotCache:
    """`num_slots` slots of `slot_length` tokens each.

    `reuse` False forgets what a finished sequence leaves, and shares only among the sequences
    of one request. Methods that move content return
    the moves, to be carried out in their order before the next run.
    """

    def __init__(self, num_slots: int, slot_length: int, reuse: bool = True) -> None:
        assert num_slots > 0
        assert slot_length > 1
        self.num_slots = num_slots
        self.slot_length = slot_length
        self._reuse = reuse
        self._slots = [_Slot() for _ in range(num_slots)]
        self._clock = itertools.count(1)

    @property
    def used_slots(self) -> int:
        return sum(slot.owner is not None for slot in self._slots)

    @property
    def active_range(self) -> int:
        """One more than the highest owned slot."""
        owned = (number for number, slot in enumerate(self._slots) if slot.owner is not None)
        return max(owned, default=-1) + 1

    def owner(self, slot: int) -> Sequence | None:
        return self._slots[slot].owner

    def idle_position(self, slot: int) -> int:
        """Where an idle row of `slot` may write: behind what is of value there."""
        return self._slots[slot].length

    def can_allocate(self) -> bool:
        return any(slot.owner is None for slot in self._slots)

    def known_length(self, sequence: Sequence, most: int) -> int:
        """How many tokens `allocate` would find in the cache now."""
        return self._longest_prefix(sequence, most)[1]

    def allocate(self, sequence: Sequence, most: int) -> list[Copy | Swap]:
        """Gives `sequence` a slot that already holds the longest known prefix of its tokens.

        At most `most` tokens are taken from the cache, and neither is a lone one taken nor left
        to compute. Sets the sequence's `slot`, `computed` and `cached_prompt_tokens`.
        """
        assert sequence.slot < 0
        assert len(sequence.token_ids) <= self.slot_length
        target = next(n for n, slot in enumerate(self._slots) if slot.owner is None)
        source, length = self._longest_prefix(sequence, most)
        moves = self._bring(source, target, length)
        self._slots[target] = _Slot(owner=sequence, last_used=next(self._clock))
        sequence.slot = target
        sequence.computed = sequence.cached_prompt_tokens = length
        return moves

    def release(self, sequence: Sequence) -> None:
        """Frees the sequence's slot; what was computed stays as prefix cache."""
        slot = self._slots[sequence.slot]
        assert slot.owner is sequence, "a slot is released by another than its owner"
        kept = slot.reusable if self._reuse else 0
        slot.tokens = sequence.token_ids[:kept]
        if kept == sequence.prompt_length:
            slot.answer = sequence.token_ids[kept : self.slot_length - 1]
        slot.owner = None
        slot.last_used = next(self._clock)
        sequence.slot = -1
        for number in self._slots_with_answers()[:-MOST_ANSWERS]:
            self._slots[number].answer = []

    def next_answer(self) -> tuple[int, int, list[int]] | None:
        """Tokens of an answer to compute as a prompt's: their slot, where they begin, and they.

        That of the conversation that was used last; None when nothing is left to do.
        """
        numbers = self._slots_with_answers()
        if not numbers:
            return None
        slot = self._slots[numbers[-1]]
        return numbers[-1], slot.length, slot.answer

    def answer_computed(self, number: int, count: int) -> None:
        """The next `count` tokens of a slot's answer are computed as a prompt's: they are content.

        None are when it failed: the rest of the answer is forgotten.
        """
        slot = self._slots[number]
        slot.tokens = slot.tokens + slot.answer[:count]
        slot.answer = slot.answer[count:] if count else []

    def forget(self, sequence: Sequence) -> None:
        """Frees the slot of a sequence whose content cannot be trusted."""
        slot = self._slots[sequence.slot]
        assert slot.owner is sequence
        self._slots[sequence.slot] = _Slot()
        sequence.slot = -1

    def compact(self) -> list[Copy | Swap]:
        """Closes, once a step, at most one hole that has been idle for long enough."""
        last = self.active_range - 1
        moves: list[Copy | Swap] = []
        for number, slot in enumerate(self._slots[: max(last, 0)]):
            if slot.owner is not None:
                continue
            slot.idle_steps += 1
            if slot.idle_steps > HOLE_PATIENCE and not moves:
                moves.append(self._exchange(number, last))
        return moves

    def check_integrity(self) -> None:
        """Raises AssertionError when the books contradict themselves."""
        for number, slot in enumerate(self._slots):
            if slot.owner is not None:
                assert slot.owner.slot == number, f"slot {number} has an owner elsewhere"
                assert not slot.tokens, f"slot {number} has an owner and content of its own"
                assert slot.owner.computed <= len(slot.owner.token_ids) <= self.slot_length
            assert slot.owner is None or not slot.answer, f"slot {number} has two answers"
            assert slot.length <= self.slot_length
            assert slot.owner is not None or slot.length + len(slot.answer) < self.slot_length

    def _slots_with_answers(self) -> list[int]:
        """Free slots with an answer of which something can be computed; last used last."""
        numbers = (n for n, slot in enumerate(self._slots) if len(slot.answer) >= SHORTEST_CHUNK)
        return sorted(numbers, key=lambda number: self._slots[number].last_used)

    def _longest_prefix(self, sequence: Sequence, most: int) -> tuple[int, int]:
        source, best = -1, SHORTEST_CHUNK - 1
        for number, slot in enumerate(self._slots):
            if not self._reuse and (slot.owner is None or slot.owner.group is not sequence.group):
                continue
            length = _common_prefix(slot.content, sequence.token_ids, min(most, slot.reusable))
            if length > best:
                source, best = number, length
        if best < len(sequence.token_ids):
            best = min(best, len(sequence.token_ids) - SHORTEST_CHUNK)
        return (source, best) if best >= SHORTEST_CHUNK else (-1, 0)

    def _bring(self, source: int, target: int, length: int) -> list[Copy | Swap]:
        """Moves that put `length` tokens of `source` into the free slot `target`.

        What `target` held is saved, if anything of more value than the least valuable slot.
        """
        if length and source == target:
            if length * 2 >= self._slots[target].length:
                return []
            # Most of it belongs to another conversation: that stays where it can be found.
            return self._save(target, keep=target)
        is_free = length > 0 and self._slots[source].owner is None
        if is_free and length * 2 >= self._slots[source].length:
            return [self._exchange(source, target)]
        moves = self._save(target, keep=source)
        if length:
            self._slots[source].last_used = next(self._clock)
            moves.append(Copy(source, target, length))
        return moves

    def _save(self, number: int, keep: int) -> list[Copy | Swap]:
        """Copies a free slot's content over the least recently used other free one."""
        slot = self._slots[number]
        others = [
            (other.last_used if other.tokens else 0, position)
            for position, other in enumerate(self._slots)
            if other.owner is None and position not in (number, keep)
        ]
        if not slot.tokens or not others:
            return []
        last_used, victim = min(others)
        if last_used > slot.last_used:
            return []
        self._slots[victim] = _Slot(slot.tokens, slot.answer, last_used=slot.last_used)
        return [Copy(number, victim, len(slot.tokens))]

    def _exchange(self, first: int, second: int) -> Copy | Swap:
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


def _common_prefix(left: list[int], right: list[int], most: int) -> int:
    """Length of the common prefix, at most `most`.

    Slices compare in C: ever longer ones up to the first that differs, which is then halved.
    """
    most = min(most, len(left), len(right))
    low, step = 0, 32
    while low < most and left[low : (high := min(low + step, most))] == right[low:high]:
        low, step = high, 2 * step
    if low == most:
        return most
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
