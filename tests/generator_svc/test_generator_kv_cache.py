"""The slots' bookkeeping, compared with a memory of token ids that carries out the moves."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator_svc.admission import Admission
from generator_svc.kv_cache import COMPACT_AFTER_IDLE_STEPS, MAX_PENDING_REPREFILLS, SlotCache
from generator_svc.plan import Copy, Swap
from generator_svc.sequence import EngineRequest, SequenceGroup

SLOT_LENGTH = 32
GARBAGE = -7


def _group(prompt, n=1):
    return SequenceGroup(EngineRequest(tuple(prompt), 8, n=n), Admission(1, 99).enter(1))


class Machine:
    """A cache, the memory that it manages, and the running sequences."""

    def __init__(self, slots, reuse=True, least=2):
        self.cache = SlotCache(slots, SLOT_LENGTH, reuse, least)
        self.least = least
        self.memory = [[GARBAGE] * SLOT_LENGTH for _ in range(slots)]
        self.running = []
        self.moves = []

    def start(self, prompt, most=SLOT_LENGTH, group=None):
        """Allocates a slot; returns the sequence, of which only the cached prefix is computed."""
        group = group or _group(prompt)
        sequence = next(s for s in group.sequences if s.slot < 0 and not s.computed)
        self.carry_out(self.cache.allocate(sequence, most))
        self.running.append(sequence)
        return sequence

    def compute(self, sequence, count):
        """Computes the next `count` tokens, generating those after the prompt."""
        for _ in range(count):
            if sequence.computed == len(sequence.token_ids):
                if len(sequence.token_ids) + 1 >= SLOT_LENGTH:
                    return
                sequence.token_ids.append(100 + len(sequence.token_ids))
            place = sequence.computed
            self.memory[sequence.slot][place] = sequence.token_ids[place]
            sequence.computed += 1
        if sequence.computed >= sequence.prompt_length:
            sequence.group.prompt_logits = "its last position's"

    def run(self, prompt):
        """A sequence's whole life: allocated, computed, released."""
        sequence = self.start(prompt)
        self.compute(sequence, len(prompt))
        self.release(sequence)
        return sequence

    def release(self, sequence, trusted=True):
        self.running.remove(sequence)
        (self.cache.release if trusted else self.cache.discard)(sequence)

    def compute_answer(self, count):
        """Re-prefills up to `count` tokens of a finished answer, if there is one."""
        found = self.cache.next_reprefill()
        if found is not None:
            slot, start, tokens = found
            tokens = tokens[:count]
            self.memory[slot][start : start + len(tokens)] = tokens
            self.cache.reprefilled(slot, len(tokens))

    def compact(self):
        self.carry_out(self.cache.compact())

    def defragment(self):
        self.carry_out(self.cache.defragment())
        assert len(self.running) == self.cache.active_range

    def reorder(self):
        """Reassigns the slots of sequences of which nothing is computed yet."""
        fresh = [s for s in reversed(self.running) if not s.computed]
        self.cache.assign_in_order(fresh)
        assert sorted(s.slot for s in fresh) == [s.slot for s in fresh]

    def idle_rows(self):
        """What a decode run writes for idle rows."""
        for slot in range(self.cache.active_range):
            if self.cache.owner(slot) is None:
                self.memory[slot][self.cache.idle_position(slot)] = GARBAGE

    def carry_out(self, moves):
        self.moves = moves
        for move in moves:
            if isinstance(move, Copy):
                self.memory[move.target][: move.length] = self.memory[move.source][: move.length]
            else:
                one, other, length = self.memory[move.first], self.memory[move.second], move.length
                one[:length], other[:length] = other[:length], one[:length]

    def kept(self):
        """What the free slots hold according to the cache."""
        return sorted(filter(None, map(self.cache.kept_tokens, range(self.cache.num_slots))))

    def check(self):
        self.cache.check_integrity()
        assert {s.slot for s in self.running} == {
            slot for slot in range(self.cache.num_slots) if self.cache.owner(slot)
        }
        for sequence in self.running:
            held = self.memory[sequence.slot][: sequence.computed]
            assert sequence.token_ids[: sequence.computed] == held
        for slot, memory in enumerate(self.memory):
            kept = self.cache.kept_tokens(slot)
            assert kept == memory[: len(kept)]


def _common(left, right):
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right))))  # noqa: B905 - ends with the shorter


def _best_prefix(machine, group, most):
    """The longest prefix that may be reused, found by brute force."""
    prompt, best = group.request.prompt, 0
    for owner in machine.running:
        if machine.cache.reuse or owner.group is group:
            there = min(owner.computed, owner.prompt_length)
            best = max(best, _common(prompt, owner.token_ids[:there]))
    if machine.cache.reuse:
        best = max([best, *(_common(prompt, tokens) for tokens in machine.kept())])
    best = min(best, most)
    if best == len(prompt) - 1:
        best -= 1  # a single token is never left to compute
    # Nor is one reused; and a prompt that is computed already is never computed again.
    return best if best >= (2 if group.prompt_logits else machine.least) else 0


BASES = [[7] * 30, list(range(30)), [*range(9), *range(50, 71)]]
prompts = st.builds(
    lambda base, cut, own: [*base[:cut], *own],
    st.sampled_from(BASES),
    st.integers(0, 24),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("start"), prompts, st.integers(0, 3), st.integers(1, 3)),
        st.tuples(st.just("sibling"), st.integers(0, 9)),
        st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 30)),
        st.tuples(st.just("release"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("release"), st.integers(0, 9), st.just(True)),
        st.tuples(st.just("step")),
        st.tuples(st.just("defragment")),
        st.tuples(st.just("reorder")),
        st.tuples(st.just("answer"), st.integers(0, 9)),
    ),
    max_size=40,
)


def _start(machine, group, most):
    if machine.cache.can_allocate():
        expected = _best_prefix(machine, group, most)
        sequence = machine.start((), most, group)
        assert expected == sequence.computed == sequence.cached_prompt_tokens


def _apply(machine, operation):
    name, *values = operation
    running = machine.running
    if name == "start":
        prompt, short, n = values
        _start(machine, _group(prompt, n), max(0, len(prompt) - short))
    elif name == "step":
        machine.compact()
        machine.check()
        machine.idle_rows()
    elif name == "defragment":
        machine.defragment()
    elif name == "reorder":
        machine.reorder()
    elif name == "answer":
        machine.compute_answer(values[0])
    elif running:
        sequence = running[values[0] % len(running)]
        if name == "compute":
            machine.compute(sequence, values[1])
        elif name == "release":
            machine.release(sequence, values[1])
        elif any(sibling.slot < 0 and not sibling.computed for sibling in sequence.group.sequences):
            _start(machine, sequence.group, sequence.prompt_length)


@settings(max_examples=400, deadline=None)
@given(
    operations=operations,
    slots=st.integers(1, 5),
    reuse=st.booleans(),
    least=st.sampled_from([2, 2, 7]),
)
def test_records_match_memory_after_any_operations(operations, slots, reuse, least):
    """Every owner finds its tokens, every free slot holds what is recorded, the longest prefix is
    found, and neither moves nor idle rows overwrite anything that is needed."""
    machine = Machine(slots, reuse, least)
    for operation in operations:
        _apply(machine, operation)
        machine.check()


DISTINCT = [[value] * 8 for value in (11, 12, 13, 14)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_least_recently_used_is_evicted_first(order):
    """In whatever slot: each unrelated prompt evicts the content that was released longest ago."""
    machine = Machine(4)
    sequences = [machine.start(prompt) for prompt in DISTINCT]
    for number in order:
        machine.compute(sequences[number], 8)
        machine.release(sequences[number])
    for strangers in range(1, 5):
        machine.start([90 + strangers, 1, 2, 3])

        assert sorted(DISTINCT[number] for number in order[strangers:]) == machine.kept()
        machine.check()


def test_copying_counts_as_use():
    """Content that was just copied from is not evicted next."""
    machine = Machine(3)
    shared = list(range(20))
    machine.run(shared)
    machine.run([31] * 6)
    machine.run([32] * 6)
    user = machine.start([*range(6), 77, 78])  # a small part of it: a copy
    machine.check()

    assert 6 == user.cached_prompt_tokens
    assert sorted([shared, [32] * 6]) == machine.kept()
    machine.start([99] * 4)
    assert [shared] == machine.kept()


def test_empty_slots_are_used_before_eviction():
    """As long as there are empty slots, nothing that was computed is evicted."""
    machine = Machine(4)
    for prompt in DISTINCT[:3]:
        machine.run(prompt)
    machine.start([99] * 4)

    assert sorted(DISTINCT[:3]) == machine.kept()


def test_continued_conversation_keeps_its_slot():
    """The common case costs nothing: the content is already in the lowest free slot."""
    machine = Machine(2)
    machine.run(list(range(10)))
    following = machine.start(list(range(14)))

    assert [] == machine.moves
    assert 10 == following.computed


def test_a_conversation_elsewhere_is_swapped_in():
    """Its slot and the lowest free one are swapped, so nothing is lost."""
    machine = Machine(2)
    first, second = machine.start([5] * 8), machine.start(list(range(10)))
    for sequence in (first, second):
        machine.compute(sequence, sequence.prompt_length)
        machine.release(sequence)
    following = machine.start(list(range(14)))
    machine.check()

    assert [Swap(1, 0, 10)] == machine.moves
    assert (0, 10) == (following.slot, following.computed)
    assert [[5] * 8] == machine.kept()


def test_short_common_prefix_is_copied_without_eviction():
    """Sharing a system prompt with a long conversation does not evict that conversation."""
    long, other = list(range(30)), [*range(6), 40, 41]
    machine = Machine(2)
    machine.run(long)
    stranger = machine.start(other)
    machine.check()

    assert 6 == stranger.computed
    assert [long] == machine.kept()


def test_the_prefix_of_a_running_sequence_is_copied():
    """The sequence keeps its slot; only its prompt's tokens are copied, not its answer's."""
    machine = Machine(2)
    first = machine.start(list(range(10)))
    machine.compute(first, 14)
    second = machine.start(list(first.token_ids))
    machine.check()

    assert [Copy(0, 1, 10)] == machine.moves
    assert 10 == second.computed


def test_uncomputed_tokens_are_not_reused():
    """Of a prompt in the middle of its prefill, what is computed so far is reused."""
    machine = Machine(2)
    first = machine.start(list(range(10)))
    machine.compute(first, 4)

    assert 4 == machine.start(list(range(10))).computed


def test_without_reuse_only_the_choices_of_a_request_share():
    """Nothing of a finished or another request is reused."""
    machine = Machine(3, reuse=False)
    prompt = list(range(10))
    machine.run(prompt)
    assert [] == machine.kept()
    group = _group(prompt, n=2)
    first = machine.start(prompt, group=group)
    machine.compute(first, 10)
    sibling = machine.start(prompt, group=group)
    stranger = machine.start(prompt)

    assert [0, 10, 0] == [first.cached_prompt_tokens, sibling.computed, stranger.computed]


def test_too_short_prefix_is_neither_found_nor_kept():
    """Until the answer, which the next turn repeats, makes it long enough; choices always share."""
    machine = Machine(3, least=10)
    machine.run(list(range(9)))
    assert [] == machine.kept()
    group = _group(list(range(9)), n=2)
    first = machine.start((), group=group)
    assert 0 == first.computed
    machine.compute(first, 12)
    assert 9 == machine.start((), group=group).computed
    machine.release(first)
    machine.compute_answer(3)

    assert 12 == machine.start(list(range(9)) + first.token_ids[9:12] + [5, 6]).computed
    machine.check()


def test_a_hole_is_closed_after_the_patience():
    """Not before, since a new request may take it; then the last active slot moves there."""
    machine = Machine(4)
    sequences = [machine.start(prompt) for prompt in DISTINCT[:3]]
    for sequence in sequences:
        machine.compute(sequence, 8)
    machine.release(sequences[0])
    moved = []
    for _ in range(COMPACT_AFTER_IDLE_STEPS + 2):
        machine.compact()
        machine.check()
        moved.append(machine.moves)

    assert [[]] * COMPACT_AFTER_IDLE_STEPS + [[Swap(0, 2, 8)], []] == moved
    assert 2 == machine.cache.active_range
    assert [DISTINCT[0]] == machine.kept()


def test_patience_restarts_with_every_hole():
    """A slot that was used and freed again has not been idle all the time."""
    machine = Machine(2)
    first, _ = machine.start(DISTINCT[0]), machine.start(DISTINCT[1])
    for _ in range(3):
        machine.release(first)
        for _ in range(COMPACT_AFTER_IDLE_STEPS):
            machine.compact()
            assert [] == machine.moves
        first = machine.start(DISTINCT[0])


def test_one_hole_is_closed_at_a_time():
    """A step makes at most one move, however many holes there are."""
    machine = Machine(4)
    sequences = [machine.start(prompt) for prompt in DISTINCT]
    machine.release(sequences[0])
    machine.release(sequences[1])
    ranges = []
    for _ in range(COMPACT_AFTER_IDLE_STEPS + 3):
        machine.compact()
        machine.check()
        ranges.append(machine.cache.active_range)

    assert [4] * COMPACT_AFTER_IDLE_STEPS + [3, 2, 2] == ranges


def test_single_token_is_neither_reused_nor_left_over():
    """A single token is computed by other kernels, so the prompt's logits would differ."""
    machine = Machine(4)
    machine.run([3])
    machine.run([4, 5, 6])

    assert 0 == machine.start([3, 4, 5]).computed
    assert 0 == machine.start([4, 5, 7]).computed
    assert 0 == machine.start([4, 9, 9]).computed


def test_content_of_a_failed_run_is_not_reused():
    """The slot of a failed run is empty afterwards."""
    machine = Machine(1)
    sequence = machine.start(list(range(10)))
    machine.compute(sequence, 10)
    machine.release(sequence, trusted=False)

    assert 0 == machine.start(list(range(10))).computed


def _converse(machine, prompt, count):
    """A sequence's whole life, with an answer of `count` tokens; returns all tokens."""
    sequence = machine.start(prompt)
    machine.compute(sequence, len(prompt) + count - sequence.computed)
    machine.release(sequence)
    return sequence.token_ids


def test_answer_is_reused_as_far_as_it_was_reprefilled():
    """Not before, as decoding uses other kernels; then as far as it was re-prefilled."""
    machine = Machine(2)
    tokens = _converse(machine, list(range(10)), 12)
    found = []
    for _ in range(3):
        following = machine.start([*tokens, 7, 7])
        found.append(following.cached_prompt_tokens)
        machine.release(following)
        tokens = _converse(machine, list(range(10)), 12)
        machine.compute_answer(5)
        machine.check()

    assert [10, 15, 15] == found


def test_latest_answer_is_reprefilled_first():
    """The client that was just answered is likely to continue first."""
    machine = Machine(3)
    _converse(machine, [5] * 8, 6)
    last = _converse(machine, list(range(10)), 6)
    machine.compute_answer(6)

    assert 16 == machine.start([*last, 3, 3]).cached_prompt_tokens
    assert machine.cache.next_reprefill() is not None


def test_answers_of_the_last_few_are_remembered():
    """After a burst of requests, not all of their answers are re-prefilled."""
    machine = Machine(MAX_PENDING_REPREFILLS + 3)
    sequences = [machine.start([60 + number] * 5) for number in range(MAX_PENDING_REPREFILLS + 3)]
    for sequence in sequences:
        machine.compute(sequence, 5 + 4)
        machine.release(sequence)
    count = 0
    while machine.cache.next_reprefill() is not None:
        machine.compute_answer(99)
        count += 1

    assert MAX_PENDING_REPREFILLS == count


def test_only_answers_are_reprefilled():
    """An abandoned prompt, an answer of one token, a failed run, a cache that is turned off."""
    machine = Machine(4)
    given_up = machine.start(list(range(10)))
    machine.compute(given_up, 4)
    machine.release(given_up)
    _converse(machine, [5] * 8, 1)
    broken = machine.start([6] * 8)
    machine.compute(broken, 12)
    machine.release(broken, trusted=False)
    forgetful = Machine(1, reuse=False)
    _converse(forgetful, list(range(10)), 9)

    assert machine.cache.next_reprefill() is None is forgetful.cache.next_reprefill()


def test_an_answer_that_fills_its_slot_leaves_room_for_an_idle_row():
    """An idle row writes after the tokens that are needed."""
    machine = Machine(2)
    tokens = _converse(machine, list(range(10)), 99)
    machine.compute_answer(99)
    machine.check()

    assert SLOT_LENGTH - 1 == len(tokens) == machine.cache.idle_position(0)
