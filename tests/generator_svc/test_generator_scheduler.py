"""Scheduling cases that random traffic rarely covers."""

import random

import numpy as np
import pytest

from generator_svc.kv_cache import SlotCache
from generator_svc.metering import PADDING
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.scheduler import Scheduler
from generator_svc.sequence import (
    EngineRequest,
    SampledToken,
    SamplingParams,
    SequenceGroup,
    SequenceStatus,
)
from tests.fakes import greedy
from tests.generator_svc.engine_harness import Harness


def _chunk_lengths(harness):
    return [len(chunk.token_ids) for plan in harness.runner.plans for chunk in plan.chunks]


def test_a_choice_whose_prompt_was_nearly_evicted_computes_no_lone_token():
    """All that is left of it in the cache is another prompt that differs in its last token."""
    prompt, nearly = [*range(2, 22), 50], [*range(2, 22), 51]
    harness = Harness(slots=2, slot_length=64)
    first = harness.submit(prompt, 2, n=3, stop_token_ids=frozenset())
    second = harness.submit(nearly, 9, n=3, stop_token_ids=frozenset())
    harness.finish()

    assert min(_chunk_lengths(harness)) >= 2
    for index in range(3):
        assert greedy(prompt, 2, eos=None) == harness.tokens[first][index]
        assert greedy(nearly, 9, eos=None) == harness.tokens[second][index]


@pytest.mark.parametrize("seed", range(6))
def test_prompts_that_nearly_agree_never_leave_a_lone_token(seed):
    """Many choices of many prompts that differ in their last tokens, in few slots."""
    draw = random.Random(seed)
    harness = Harness(
        slots=draw.choice([2, 3]), max_num_batched_tokens=draw.choice([8, 64]), seed=seed
    )
    groups = []
    for _ in range(12):
        prompt = [*range(2, 2 + draw.randrange(2, 20)), draw.randrange(40, 44)]
        groups.append(harness.submit(prompt, draw.randrange(1, 6), n=draw.choice([1, 2, 4])))
    harness.finish()

    assert min(_chunk_lengths(harness)) >= 2
    for group in groups:
        wanted = greedy(group.request.prompt, group.request.max_new_tokens)
        assert all(wanted == tokens for tokens in harness.tokens[group].values())


@pytest.mark.parametrize("max_prefill_batch_size", [0, 4])
@pytest.mark.parametrize("max_num_batched_tokens", [8, 33, 40, 64, 512])
def test_no_token_is_alone_in_an_attention_tile(max_num_batched_tokens, max_prefill_batch_size):
    """Chunks one token longer than a multiple of the tile size are shortened, also where prompts
    are prefilled in batches and one is too long for a step."""
    harness = Harness(
        2,
        256,
        reuse=False,
        max_num_batched_tokens=max_num_batched_tokens,
        max_prefill_batch_size=max_prefill_batch_size,
        max_queued_requests=200,
    )
    groups = [harness.submit([9] * length, 2) for length in range(2, 100)]
    harness.finish()

    assert 1 not in {length % 32 for length in _chunk_lengths(harness)}
    for group in groups:
        assert greedy(group.request.prompt, 2) == harness.tokens[group][0]


@pytest.mark.parametrize("seed", range(4))
def test_padded_decode_batches_give_the_same_tokens(seed):
    """Every batch has one of the given sizes; prompts in free slots stay cached."""
    draw = random.Random(seed)
    sizes = (1, 2, 4, 6)
    harness = Harness(slots=6, seed=seed, batch_sizes=sizes)
    groups = []
    for _ in range(20):
        prompt = [*range(2, 2 + draw.randrange(2, 20)), draw.randrange(40, 44)]
        groups.append(harness.submit(prompt, draw.randrange(1, 9), n=draw.choice([1, 2, 3])))
        for _ in range(draw.randrange(4)):
            harness.step()
    harness.finish()
    again = harness.submit(list(groups[-1].request.prompt), 2)
    harness.finish()

    assert {len(plan.rows) for plan in harness.runner.plans} <= {0, *sizes}
    for group in groups:
        wanted = greedy(group.request.prompt, group.request.max_new_tokens)
        assert all(wanted == tokens for tokens in harness.tokens[group].values())
    assert again.sequences[0].cached_prompt_tokens >= len(again.request.prompt) - 2


def _batches(harness):
    return [batch for plan in harness.runner.plans for batch in plan.batches]


def test_whole_prompts_are_prefilled_in_one_run():
    """As many as the setting allows, padded to the same length, and the answers are right."""
    harness = Harness(
        slots=8, slot_length=128, max_num_batched_tokens=512, max_prefill_batch_size=4
    )
    prompts = [[*range(2, 22 + count)] for count in range(6)]
    groups = [harness.submit(prompt, 3) for prompt in prompts]
    harness.finish()

    assert [4, 2] == [len(batch.prompts) for batch in _batches(harness)]
    assert {32} == {batch.length for batch in _batches(harness)}
    assert [] == _chunk_lengths(harness)
    assert [greedy(p, 3) for p in prompts] == [harness.tokens[group][0] for group in groups]


def test_only_prompts_of_similar_lengths_are_prefilled_in_one_run():
    """Short prompts are not padded to the length of a long one, in whatever order they come."""
    harness = Harness(
        slots=8, slot_length=512, max_num_batched_tokens=2048, max_prefill_batch_size=8
    )
    groups = [harness.submit([length] * length, 2) for length in (20, 25, 30, 390, 10, 300, 290)]
    harness.finish()

    assert [(4, 32), (3, 448)] == [(len(b.prompts), b.length) for b in _batches(harness)]
    assert all(greedy(g.request.prompt, 2) == harness.tokens[g][0] for g in groups)


def test_padded_prefill_batch_fits_max_num_batched_tokens():
    """The activations of a larger one might not fit into the device's memory."""
    harness = Harness(
        slots=8, slot_length=128, max_num_batched_tokens=256, max_prefill_batch_size=8
    )
    for count in range(7):
        harness.submit([count + 2] * 33, 2)
    harness.finish()

    assert [(4, 64), (3, 64)] == [(len(b.prompts), b.length) for b in _batches(harness)]


def test_no_prompt_is_chunked_to_fill_a_step():
    """It waits for the next one and is prefilled with others that wait. A prompt that is too long
    for any step is split, and the rest of the step is for others."""
    harness = Harness(
        slots=8,
        slot_length=256,
        prefill_tokens=96,
        max_num_batched_tokens=128,
        max_prefill_batch_size=8,
    )
    short = [harness.submit([value] * 60, 2) for value in range(5, 10)]
    harness.finish()

    assert [2, 2, 1] == [len(batch.prompts) for batch in _batches(harness)]
    assert [] == _chunk_lengths(harness)
    long = harness.submit([4] * 130, 2)
    harness.finish()
    assert 130 == sum(_chunk_lengths(harness))
    assert all(greedy(g.request.prompt, 2) == harness.tokens[g][0] for g in (*short, long))


def test_a_short_common_prefix_does_not_keep_prompts_out_of_a_run():
    """Such as a system prompt: recomputing it takes less time than a run for each prompt."""
    prompts = [[*range(2, 14), *[value] * 10] for value in range(20, 24)]
    runs = {}
    for least in (2, 32):
        harness = Harness(
            slots=4,
            max_num_batched_tokens=128,
            max_prefill_batch_size=4,
            min_reused_tokens=least,
        )
        harness.submit([*range(2, 14), 3], 2)
        harness.finish()
        before = len(harness.runner.plans)
        groups = [harness.submit(prompt, 3) for prompt in prompts]
        harness.finish()
        plans = harness.runner.plans[before:]
        runs[least] = sum(len(plan.batches) + len(plan.chunks) for plan in plans)
        assert [greedy(prompt, 3) for prompt in prompts] == [harness.tokens[g][0] for g in groups]

    assert {2: 4, 32: 1} == runs


def test_stream_between_prompts_is_moved_to_batch_them():
    """A run covers consecutive slots, so the stream between them is moved."""
    harness = Harness(
        slots=3, prefill_tokens=64, max_num_batched_tokens=64, max_prefill_batch_size=4
    )
    first = harness.submit([5, 6], 2, stop_token_ids=frozenset())
    between = harness.submit([7, 8], 40, stop_token_ids=frozenset())
    harness.step()
    harness.step()
    assert harness.finished[first]
    newcomers = [harness.submit([value, value], 3) for value in (9, 10)]
    harness.finish()

    assert [2, 2] == [len(batch.prompts) for batch in _batches(harness)]
    assert greedy([7, 8], 40, eos=None) == harness.tokens[between][0]
    assert [greedy([v, v], 3) for v in (9, 10)] == [harness.tokens[g][0] for g in newcomers]


def test_decode_batches_shrink_once_streams_have_ended():
    """The last stream moves into a slot that became free, so that no idle row is left."""
    harness = Harness(slots=3, reuse=False)
    ends = [harness.submit([value, 3], 2, stop_token_ids=frozenset()) for value in (7, 8)]
    goes_on = harness.submit([9, 3], 20, stop_token_ids=frozenset())
    harness.finish()
    sizes = [len(plan.rows) for plan in harness.runner.plans]

    assert all(harness.finished[group] for group in ends)
    assert (3, 1) == (max(sizes), sizes[-1])
    assert greedy([9, 3], 20, eos=None) == harness.tokens[goes_on][0]


def test_chunked_and_partly_cached_prompts_are_prefilled_alone():
    """With past keys and values, attention takes one sequence at a time, without padding."""
    harness = Harness(slots=4, slot_length=128, max_num_batched_tokens=64, max_prefill_batch_size=4)
    harness.submit([9] * 40, 2)
    harness.finish()
    batches = len(_batches(harness))
    following = harness.submit([*[9] * 40, 5, 6, 7], 2)
    long = harness.submit([8] * 100, 2)
    harness.finish()

    assert 40 == following.sequences[0].cached_prompt_tokens
    assert batches == len(_batches(harness))
    assert greedy([8] * 100, 2) == harness.tokens[long][0]


def test_padding_of_prompts_is_overhead():
    """Each prompt pays for its own tokens; the rest of the run is padding, to the nanosecond."""
    harness = Harness(slots=2, max_num_batched_tokens=64, max_prefill_batch_size=2)
    groups = [harness.submit([value] * length, 1) for value, length in ((8, 24), (9, 16))]
    harness.finish()
    spent = [group.sequences[0].device_nanoseconds for group in groups]
    busy = harness.meter.busy

    assert busy == harness.runner.busy == sum(spent) + harness.meter.overhead[PADDING]
    for nanoseconds, tokens in zip(spent, (24, 16), strict=True):
        assert abs(nanoseconds - busy * tokens / 64) < 1


@pytest.mark.parametrize("stopped", [[0], [0, 1], [1], [2, 0], [1, 0]])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_next_choice_takes_over_the_prefill(stopped, steps):
    """Whichever choices are stopped, and whenever, the others are complete."""
    prompt = list(range(2, 40))
    harness = Harness(slots=2, max_num_batched_tokens=8)
    group = harness.submit(prompt, 4, n=3)
    for _ in range(steps):
        harness.step()
    for index in stopped:
        harness.engine.stop(group, index)
    harness.finish()

    assert {0, 1, 2} == harness.finished[group]
    for index in {0, 1, 2} - {*stopped}:
        assert greedy(prompt, 4) == harness.tokens[group][index]


def test_stopping_all_choices_ends_the_request():
    """Nothing is computed for it."""
    harness = Harness()
    group = harness.submit(list(range(2, 40)), 4, n=3)
    for index in (0, 1, 2):
        harness.engine.stop(group, index)
    harness.finish()

    assert {0, 1, 2} == harness.finished[group]
    assert 0 == harness.runner.prefilled_tokens


def test_a_prompt_of_one_token_is_answered():
    """It is the only case of a chunk of one token."""
    harness = Harness()
    group = harness.submit([5], 6, n=2)
    harness.finish()

    assert greedy([5], 6) == harness.tokens[group][0] == harness.tokens[group][1]


def test_an_answer_may_fill_its_slot():
    """Prompt and answer together may use the slot up to its last position."""
    harness = Harness(slots=2, slot_length=16)
    full = harness.submit([5, 6], 14, stop_token_ids=frozenset())
    other = harness.submit(list(range(2, 17)), 1, stop_token_ids=frozenset())
    harness.finish()

    assert greedy([5, 6], 14, eos=None) == harness.tokens[full][0]
    assert greedy(range(2, 17), 1, eos=None) == harness.tokens[other][0]


def test_requests_start_in_order_of_arrival():
    """With one slot, they run one after the other."""
    harness = Harness(slots=1)
    groups = [harness.submit([value, 3], 3, stop_token_ids=frozenset()) for value in (7, 8, 9)]
    order = []
    while len(order) < 3:
        harness.step()
        order += [g for g in groups if harness.finished[g] and g not in order]

    assert groups == order
    harness.finish()


def test_choices_start_in_the_order_of_their_indices():
    """And before requests that came later."""
    harness = Harness(slots=1)
    group = harness.submit([7, 8, 9], 3, n=4, stop_token_ids=frozenset())
    later = harness.submit([5, 6], 3, stop_token_ids=frozenset())
    order = []
    while not harness.finished[later]:
        harness.step()
        order += [index for index in harness.finished[group] if index not in order]

    assert [0, 1, 2, 3] == order
    harness.finish()


def test_stop_after_the_end_has_no_effect():
    """There is no second final update, and nothing is freed twice."""
    harness = Harness()
    group = harness.submit([7, 8], 3, sampling=SamplingParams(seed=1))
    harness.finish()
    harness.engine.stop(group, 0)
    harness.engine.cancel(group)
    harness.finish()

    assert {0} == harness.finished[group]


def _steps_until(harness, group, most=400):
    """Steps until the first token of `group`; returns the number of steps."""
    for step in range(1, most):
        harness.step()
        if harness.tokens[group][0]:
            return step
    raise AssertionError("it never started")


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """While a long prompt is prefilled, half of each step is for the others, shortest first."""
    harness = Harness(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    running = harness.submit([5, 6], 200, stop_token_ids=frozenset())
    harness.step()
    long = harness.submit([7] * 400, 2)
    harness.step()
    short = harness.submit([8] * 14, 2)

    assert _steps_until(harness, short) <= 2
    assert not harness.tokens[long][0]
    harness.engine.cancel(running)
    harness.finish()


def test_short_prompts_do_not_starve_a_long_one():
    """Once it has started, it gets at least half of every step, however many others arrive."""
    harness = Harness(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    harness.submit([5, 6], 300, stop_token_ids=frozenset())
    harness.step()
    long = harness.submit([7] * 320, 2)
    steps = 0
    while not harness.tokens[long][0]:
        for value in (8, 9):
            harness.submit([value] * 30, 1)
        harness.step()
        steps += 1

    assert steps <= 2 * 320 / 32 + 4
    harness.finish()


def test_slow_tokens_do_not_starve_a_long_prompt():
    """Nor if, late in the prompt, half of a step is too short for a single one of them."""
    harness = Harness(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    harness.scheduler.prefill_cost.cost = lambda start: 1.0 if start < 64 else 40.0
    harness.submit([5, 6], 300, stop_token_ids=frozenset())
    harness.step()
    long = harness.submit([7] * 320, 2)
    steps = 0
    while not harness.tokens[long][0] and steps < 200:
        if len(harness.scheduler.waiting) < 2:
            harness.submit([8, *[steps % 60] * 29], 1)
        harness.step()
        steps += 1

    assert greedy([7] * 320, 1) == harness.tokens[long][0]
    harness.finish()


def test_only_one_long_prompt_is_prefilled_at_a_time():
    """The second would hold a slot that short requests can use in the meantime."""
    harness = Harness(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    harness.submit([5, 6], 300, stop_token_ids=frozenset())
    harness.step()
    first, second = harness.submit([7] * 300, 2), harness.submit([9] * 300, 2)
    short = harness.submit([8] * 14, 2)
    _steps_until(harness, short)
    harness.step()

    assert not harness.tokens[first][0]
    assert second.sequences[0] in harness.scheduler.waiting
    _steps_until(harness, first)
    _steps_until(harness, second)
    harness.finish()


def test_a_long_conversation_that_is_cached_does_not_wait_for_a_long_prompt():
    """Only its uncached part counts, which is short."""
    harness = Harness(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    harness.submit([9] * 300, 2)
    harness.finish()
    harness.submit([5, 6], 300, stop_token_ids=frozenset())
    harness.step()
    long = harness.submit([7] * 400, 2)
    harness.step()
    following = harness.submit([*[9] * 300, *range(2, 10)], 2)

    assert _steps_until(harness, following) <= 2
    assert not harness.tokens[long][0]
    harness.finish()


def test_prefill_stalls_streams_no_longer_than_configured():
    """At the measured speed, a step's chunks take no longer than the configured stall."""
    stall, slot_length = 50_000, 8192
    harness = Harness(slots=2, slot_length=slot_length)
    cost_model = PrefillCostModel()
    scheduler = Scheduler(SlotCache(2, slot_length), cost_model, stall, 512, harness.meter.settle)
    for sequence in _groups(harness, [[5, 6], [7] * 8000]):
        scheduler.add(sequence)
    spent = []
    while scheduler.waiting or any(
        s.status is not SequenceStatus.DECODE for s in scheduler.running
    ):
        step = scheduler.schedule()
        # A token at position p takes 100 + p / 40 ns.
        times = [len(c.token_ids) * (100 + c.start // 40) for c in step.plan.chunks]
        if step.rows:
            spent.append(sum(times))
        scheduler.observe(step, times)
        first = [
            (s, SampledToken(9))
            for s, c in zip(step.chunks, step.plan.chunks, strict=True)
            if c.wants_logits
        ]
        rows = [(s, SampledToken(9)) for s in step.rows if s is not None]
        scheduler.commit(step, [*first, *rows])

    assert max(spent[2:]) <= 1.3 * stall
    assert np.median(spent[2:]) >= 0.7 * stall


@pytest.mark.parametrize(("streams", "most"), [(4, 92), (68, 32)])
def test_decoding_sequences_count_towards_max_num_batched_tokens(streams, most):
    """Prompts get what is left of the maximum, and at least one tile."""
    harness = Harness(
        slots=70, slot_length=256, prefill_tokens=200, max_num_batched_tokens=96, reuse=False
    )
    for value in range(streams):
        harness.submit([5, value % 60], 60, stop_token_ids=frozenset())
    while len(harness.tokens) < streams:
        harness.step()
    harness.submit([7] * 200, 2)
    harness.step()
    plan = harness.runner.plans[-1]

    assert streams == sum(not row.is_idle for row in plan.rows)
    assert most == sum(len(chunk.token_ids) for chunk in plan.chunks)
    harness.finish()


@pytest.mark.parametrize(("streams", "prompts", "stretch"), [(4, 4, 1), (2, 4, 2), (1, 7, 4)])
def test_prefill_stall_grows_if_prompts_outnumber_streams(streams, prompts, stretch):
    """With no more prompts than streams, a step prefills for prefill_stall_ms, however many come.

    With fewer streams than prompts it prefills for longer, up to four times.
    """
    harness = Harness(slots=8, slot_length=256, prefill_tokens=64, max_num_batched_tokens=512)
    for value in range(streams):
        harness.submit([5, value], 60, stop_token_ids=frozenset())
    harness.step()
    for value in range(prompts):
        harness.submit([value] * 64, 2)
    harness.step()
    plan = harness.runner.plans[-1]

    assert streams == sum(not row.is_idle for row in plan.rows)
    assert stretch * 64 == sum(len(chunk.token_ids) for chunk in plan.chunks)
    harness.finish()


def _groups(harness, prompts):
    for prompt in prompts:
        request = EngineRequest(tuple(prompt), 10_000 - len(prompt))
        yield SequenceGroup(request, harness.admission.enter(len(prompt)))
