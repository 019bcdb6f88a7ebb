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
from tests.generator_svc.engine_bench import Bench


def _chunk_lengths(bench):
    return [len(chunk.token_ids) for plan in bench.runner.plans for chunk in plan.chunks]


def test_a_choice_whose_prompt_was_nearly_evicted_computes_no_lone_token():
    """All that is left of it in the cache is another prompt that differs in its last token."""
    prompt, nearly = [*range(2, 22), 50], [*range(2, 22), 51]
    bench = Bench(slots=2, slot_length=64)
    first = bench.submit(prompt, 2, n=3, stop_token_ids=frozenset())
    second = bench.submit(nearly, 9, n=3, stop_token_ids=frozenset())
    bench.finish()

    assert min(_chunk_lengths(bench)) >= 2
    for index in range(3):
        assert greedy(prompt, 2, eos=None) == bench.tokens[first][index]
        assert greedy(nearly, 9, eos=None) == bench.tokens[second][index]


@pytest.mark.parametrize("seed", range(6))
def test_prompts_that_nearly_agree_never_leave_a_lone_token(seed):
    """Many choices of many prompts that differ in their last tokens, in few slots."""
    draw = random.Random(seed)
    bench = Bench(slots=draw.choice([2, 3]), max_num_batched_tokens=draw.choice([8, 64]), seed=seed)
    groups = []
    for _ in range(12):
        prompt = [*range(2, 2 + draw.randrange(2, 20)), draw.randrange(40, 44)]
        groups.append(bench.submit(prompt, draw.randrange(1, 6), n=draw.choice([1, 2, 4])))
    bench.finish()

    assert min(_chunk_lengths(bench)) >= 2
    for group in groups:
        wanted = greedy(group.request.prompt, group.request.max_new_tokens)
        assert all(wanted == tokens for tokens in bench.tokens[group].values())


@pytest.mark.parametrize("max_prefill_batch_size", [0, 4])
@pytest.mark.parametrize("max_num_batched_tokens", [8, 33, 40, 64, 512])
def test_no_token_is_alone_in_a_tile_of_the_attention(
    max_num_batched_tokens, max_prefill_batch_size
):
    """Chunks one token longer than a multiple of the tile size are shortened, also where prompts
    are prefilled in batches and one is too long for a step."""
    bench = Bench(
        2,
        256,
        reuse=False,
        max_num_batched_tokens=max_num_batched_tokens,
        max_prefill_batch_size=max_prefill_batch_size,
        max_queued_requests=200,
    )
    groups = [bench.submit([9] * length, 2) for length in range(2, 100)]
    bench.finish()

    assert 1 not in {length % 32 for length in _chunk_lengths(bench)}
    for group in groups:
        assert greedy(group.request.prompt, 2) == bench.tokens[group][0]


@pytest.mark.parametrize("seed", range(4))
def test_padded_decode_batches_give_the_same_tokens(seed):
    """Every batch has one of the given sizes; prompts in free slots stay cached."""
    draw = random.Random(seed)
    sizes = (1, 2, 4, 6)
    bench = Bench(slots=6, seed=seed, batch_sizes=sizes)
    groups = []
    for _ in range(20):
        prompt = [*range(2, 2 + draw.randrange(2, 20)), draw.randrange(40, 44)]
        groups.append(bench.submit(prompt, draw.randrange(1, 9), n=draw.choice([1, 2, 3])))
        for _ in range(draw.randrange(4)):
            bench.step()
    bench.finish()
    again = bench.submit(list(groups[-1].request.prompt), 2)
    bench.finish()

    assert {len(plan.rows) for plan in bench.runner.plans} <= {0, *sizes}
    for group in groups:
        wanted = greedy(group.request.prompt, group.request.max_new_tokens)
        assert all(wanted == tokens for tokens in bench.tokens[group].values())
    assert again.sequences[0].cached_prompt_tokens >= len(again.request.prompt) - 2


def _batches(bench):
    return [batch for plan in bench.runner.plans for batch in plan.batches]


def test_whole_prompts_are_prefilled_in_one_run():
    """As many as the setting allows, padded to the same length, and the answers are right."""
    bench = Bench(slots=8, slot_length=128, max_num_batched_tokens=512, max_prefill_batch_size=4)
    prompts = [[*range(2, 22 + count)] for count in range(6)]
    groups = [bench.submit(prompt, 3) for prompt in prompts]
    bench.finish()

    assert [4, 2] == [len(batch.prompts) for batch in _batches(bench)]
    assert {32} == {batch.length for batch in _batches(bench)}
    assert [] == _chunk_lengths(bench)
    assert [greedy(p, 3) for p in prompts] == [bench.tokens[group][0] for group in groups]


def test_only_prompts_of_similar_lengths_are_prefilled_in_one_run():
    """Short prompts are not padded to the length of a long one, in whatever order they come."""
    bench = Bench(slots=8, slot_length=512, max_num_batched_tokens=2048, max_prefill_batch_size=8)
    groups = [bench.submit([length] * length, 2) for length in (20, 25, 30, 390, 10, 300, 290)]
    bench.finish()

    assert [(4, 32), (3, 448)] == [(len(b.prompts), b.length) for b in _batches(bench)]
    assert all(greedy(g.request.prompt, 2) == bench.tokens[g][0] for g in groups)


def test_a_run_is_no_larger_than_a_step_with_its_padding():
    """The activations of a larger one might not fit into the device's memory."""
    bench = Bench(slots=8, slot_length=128, max_num_batched_tokens=256, max_prefill_batch_size=8)
    for count in range(7):
        bench.submit([count + 2] * 33, 2)
    bench.finish()

    assert [(4, 64), (3, 64)] == [(len(b.prompts), b.length) for b in _batches(bench)]


def test_no_prompt_is_cut_to_fill_up_a_step():
    """It waits for the next one and is prefilled with others that wait. A prompt that is too long
    for any step is split, and the rest of the step is for others."""
    bench = Bench(
        slots=8,
        slot_length=256,
        prefill_tokens=96,
        max_num_batched_tokens=128,
        max_prefill_batch_size=8,
    )
    short = [bench.submit([value] * 60, 2) for value in range(5, 10)]
    bench.finish()

    assert [2, 2, 1] == [len(batch.prompts) for batch in _batches(bench)]
    assert [] == _chunk_lengths(bench)
    long = bench.submit([4] * 130, 2)
    bench.finish()
    assert 130 == sum(_chunk_lengths(bench))
    assert all(greedy(g.request.prompt, 2) == bench.tokens[g][0] for g in (*short, long))


def test_a_short_common_prefix_does_not_keep_prompts_out_of_a_run():
    """Such as a system prompt: recomputing it takes less time than a run for each prompt."""
    prompts = [[*range(2, 14), *[value] * 10] for value in range(20, 24)]
    runs = {}
    for least in (2, 32):
        bench = Bench(
            slots=4,
            max_num_batched_tokens=128,
            max_prefill_batch_size=4,
            min_reused_tokens=least,
        )
        bench.submit([*range(2, 14), 3], 2)
        bench.finish()
        before = len(bench.runner.plans)
        groups = [bench.submit(prompt, 3) for prompt in prompts]
        bench.finish()
        plans = bench.runner.plans[before:]
        runs[least] = sum(len(plan.batches) + len(plan.chunks) for plan in plans)
        assert [greedy(prompt, 3) for prompt in prompts] == [bench.tokens[g][0] for g in groups]

    assert {2: 4, 32: 1} == runs


def test_prompts_on_both_sides_of_a_running_stream_are_one_run():
    """A run covers consecutive slots, so the stream between them is moved."""
    bench = Bench(slots=3, prefill_tokens=64, max_num_batched_tokens=64, max_prefill_batch_size=4)
    first = bench.submit([5, 6], 2, stop_token_ids=frozenset())
    between = bench.submit([7, 8], 40, stop_token_ids=frozenset())
    bench.step()
    bench.step()
    assert bench.finished[first]
    newcomers = [bench.submit([value, value], 3) for value in (9, 10)]
    bench.finish()

    assert [2, 2] == [len(batch.prompts) for batch in _batches(bench)]
    assert greedy([7, 8], 40, eos=None) == bench.tokens[between][0]
    assert [greedy([v, v], 3) for v in (9, 10)] == [bench.tokens[g][0] for g in newcomers]


def test_decode_batches_shrink_once_streams_have_ended():
    """The last stream moves into a slot that became free, so that no idle row is left."""
    bench = Bench(slots=3, reuse=False)
    ends = [bench.submit([value, 3], 2, stop_token_ids=frozenset()) for value in (7, 8)]
    goes_on = bench.submit([9, 3], 20, stop_token_ids=frozenset())
    bench.finish()
    sizes = [len(plan.rows) for plan in bench.runner.plans]

    assert all(bench.finished[group] for group in ends)
    assert (3, 1) == (max(sizes), sizes[-1])
    assert greedy([9, 3], 20, eos=None) == bench.tokens[goes_on][0]


def test_cut_and_partly_cached_prompts_are_prefilled_alone():
    """With past keys and values, attention takes one sequence at a time, without padding."""
    bench = Bench(slots=4, slot_length=128, max_num_batched_tokens=64, max_prefill_batch_size=4)
    bench.submit([9] * 40, 2)
    bench.finish()
    batches = len(_batches(bench))
    following = bench.submit([*[9] * 40, 5, 6, 7], 2)
    long = bench.submit([8] * 100, 2)
    bench.finish()

    assert 40 == following.sequences[0].cached_prompt_tokens
    assert batches == len(_batches(bench))
    assert greedy([8] * 100, 2) == bench.tokens[long][0]


def test_padding_of_prompts_is_overhead():
    """Each prompt pays for its own tokens; the rest of the run is padding, to the nanosecond."""
    bench = Bench(slots=2, max_num_batched_tokens=64, max_prefill_batch_size=2)
    groups = [bench.submit([value] * length, 1) for value, length in ((8, 24), (9, 16))]
    bench.finish()
    spent = [group.sequences[0].device_nanoseconds for group in groups]
    busy = bench.meter.busy

    assert busy == bench.runner.busy == sum(spent) + bench.meter.overhead[PADDING]
    for nanoseconds, tokens in zip(spent, (24, 16), strict=True):
        assert abs(nanoseconds - busy * tokens / 64) < 1


@pytest.mark.parametrize("stopped", [[0], [0, 1], [1], [2, 0], [1, 0]])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_next_choice_takes_the_prefill_over(stopped, steps):
    """Whichever choices are stopped, and whenever, the others are complete."""
    prompt = list(range(2, 40))
    bench = Bench(slots=2, max_num_batched_tokens=8)
    group = bench.submit(prompt, 4, n=3)
    for _ in range(steps):
        bench.step()
    for index in stopped:
        bench.engine.stop(group, index)
    bench.finish()

    assert {0, 1, 2} == bench.finished[group]
    for index in {0, 1, 2} - {*stopped}:
        assert greedy(prompt, 4) == bench.tokens[group][index]


def test_stopping_all_choices_ends_the_request():
    """Nothing is computed for it."""
    bench = Bench()
    group = bench.submit(list(range(2, 40)), 4, n=3)
    for index in (0, 1, 2):
        bench.engine.stop(group, index)
    bench.finish()

    assert {0, 1, 2} == bench.finished[group]
    assert 0 == bench.runner.prefilled_tokens


def test_a_prompt_of_one_token_is_answered():
    """It is the only case of a chunk of one token."""
    bench = Bench()
    group = bench.submit([5], 6, n=2)
    bench.finish()

    assert greedy([5], 6) == bench.tokens[group][0] == bench.tokens[group][1]


def test_an_answer_may_fill_its_slot():
    """Prompt and answer together may use the slot up to its last position."""
    bench = Bench(slots=2, slot_length=16)
    full = bench.submit([5, 6], 14, stop_token_ids=frozenset())
    other = bench.submit(list(range(2, 17)), 1, stop_token_ids=frozenset())
    bench.finish()

    assert greedy([5, 6], 14, eos=None) == bench.tokens[full][0]
    assert greedy(range(2, 17), 1, eos=None) == bench.tokens[other][0]


def test_requests_start_in_the_order_they_came():
    """With one slot, they run one after the other."""
    bench = Bench(slots=1)
    groups = [bench.submit([value, 3], 3, stop_token_ids=frozenset()) for value in (7, 8, 9)]
    order = []
    while len(order) < 3:
        bench.step()
        order += [g for g in groups if bench.finished[g] and g not in order]

    assert groups == order
    bench.finish()


def test_choices_start_in_the_order_of_their_indices():
    """And before requests that came later."""
    bench = Bench(slots=1)
    group = bench.submit([7, 8, 9], 3, n=4, stop_token_ids=frozenset())
    later = bench.submit([5, 6], 3, stop_token_ids=frozenset())
    order = []
    while not bench.finished[later]:
        bench.step()
        order += [index for index in bench.finished[group] if index not in order]

    assert [0, 1, 2, 3] == order
    bench.finish()


def test_a_stop_after_the_end_is_without_effect():
    """There is no second final update, and nothing is freed twice."""
    bench = Bench()
    group = bench.submit([7, 8], 3, sampling=SamplingParams(seed=1))
    bench.finish()
    bench.engine.stop(group, 0)
    bench.engine.cancel(group)
    bench.finish()

    assert {0} == bench.finished[group]


def _steps_until(bench, group, most=400):
    """Steps until the first token of `group`; returns the number of steps."""
    for step in range(1, most):
        bench.step()
        if bench.tokens[group][0]:
            return step
    raise AssertionError("it never started")


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """While a long prompt is prefilled, half of each step is for the others, shortest first."""
    bench = Bench(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    running = bench.submit([5, 6], 200, stop_token_ids=frozenset())
    bench.step()
    long = bench.submit([7] * 400, 2)
    bench.step()
    short = bench.submit([8] * 14, 2)

    assert _steps_until(bench, short) <= 2
    assert not bench.tokens[long][0]
    bench.engine.cancel(running)
    bench.finish()


def test_a_long_prompt_does_not_starve_under_short_ones():
    """Once it has started, it gets at least half of every step, however many others arrive."""
    bench = Bench(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    bench.submit([5, 6], 300, stop_token_ids=frozenset())
    bench.step()
    long = bench.submit([7] * 320, 2)
    steps = 0
    while not bench.tokens[long][0]:
        for value in (8, 9):
            bench.submit([value] * 30, 1)
        bench.step()
        steps += 1

    assert steps <= 2 * 320 / 32 + 4
    bench.finish()


def test_a_long_prompt_does_not_starve_where_its_tokens_are_slow():
    """Nor if, late in the prompt, half of a step is too short for a single one of them."""
    bench = Bench(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    bench.scheduler.prefill_cost.cost = lambda start: 1.0 if start < 64 else 40.0
    bench.submit([5, 6], 300, stop_token_ids=frozenset())
    bench.step()
    long = bench.submit([7] * 320, 2)
    steps = 0
    while not bench.tokens[long][0] and steps < 200:
        if len(bench.scheduler.waiting) < 2:
            bench.submit([8, *[steps % 60] * 29], 1)
        bench.step()
        steps += 1

    assert greedy([7] * 320, 1) == bench.tokens[long][0]
    bench.finish()


def test_a_long_prompt_is_not_started_beside_another():
    """The second would hold a slot that short requests can use in the meantime."""
    bench = Bench(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    bench.submit([5, 6], 300, stop_token_ids=frozenset())
    bench.step()
    first, second = bench.submit([7] * 300, 2), bench.submit([9] * 300, 2)
    short = bench.submit([8] * 14, 2)
    _steps_until(bench, short)
    bench.step()

    assert not bench.tokens[first][0]
    assert second.sequences[0] in bench.scheduler.waiting
    _steps_until(bench, first)
    _steps_until(bench, second)
    bench.finish()


def test_a_long_conversation_that_is_cached_does_not_wait_for_a_long_prompt():
    """Only its uncached part counts, which is short."""
    bench = Bench(slots=4, slot_length=512, prefill_tokens=32, max_num_batched_tokens=32)
    bench.submit([9] * 300, 2)
    bench.finish()
    bench.submit([5, 6], 300, stop_token_ids=frozenset())
    bench.step()
    long = bench.submit([7] * 400, 2)
    bench.step()
    following = bench.submit([*[9] * 300, *range(2, 10)], 2)

    assert _steps_until(bench, following) <= 2
    assert not bench.tokens[long][0]
    bench.finish()


def test_running_streams_are_held_up_no_longer_than_the_dial_says():
    """At the measured speed, a step's chunks take no longer than the configured stall."""
    stall, slot_length = 50_000, 8192
    bench = Bench(slots=2, slot_length=slot_length)
    cost_model = PrefillCostModel()
    scheduler = Scheduler(SlotCache(2, slot_length), cost_model, stall, 512, bench.meter.settle)
    for sequence in _groups(bench, [[5, 6], [7] * 8000]):
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
def test_decoding_sequences_count_among_the_tokens_of_a_step(streams, most):
    """Prompts get what is left of the maximum, and at least one tile."""
    bench = Bench(
        slots=70, slot_length=256, prefill_tokens=200, max_num_batched_tokens=96, reuse=False
    )
    for value in range(streams):
        bench.submit([5, value % 60], 60, stop_token_ids=frozenset())
    while len(bench.tokens) < streams:
        bench.step()
    bench.submit([7] * 200, 2)
    bench.step()
    plan = bench.runner.plans[-1]

    assert streams == sum(not row.is_idle for row in plan.rows)
    assert most == sum(len(chunk.token_ids) for chunk in plan.chunks)
    bench.finish()


@pytest.mark.parametrize(("streams", "prompts", "stretch"), [(4, 4, 1), (2, 4, 2), (1, 7, 4)])
def test_newcomers_hold_streams_up_by_how_many_they_are(streams, prompts, stretch):
    """With no more prompts than streams, a step prefills for prefill_stall_ms, however many come.

    With fewer streams than prompts it prefills for longer, up to four times.
    """
    bench = Bench(slots=8, slot_length=256, prefill_tokens=64, max_num_batched_tokens=512)
    for value in range(streams):
        bench.submit([5, value], 60, stop_token_ids=frozenset())
    bench.step()
    for value in range(prompts):
        bench.submit([value] * 64, 2)
    bench.step()
    plan = bench.runner.plans[-1]

    assert streams == sum(not row.is_idle for row in plan.rows)
    assert stretch * 64 == sum(len(chunk.token_ids) for chunk in plan.chunks)
    bench.finish()


def _groups(bench, prompts):
    for prompt in prompts:
        request = EngineRequest(tuple(prompt), 10_000 - len(prompt))
        yield SequenceGroup(request, bench.admission.enter(len(prompt)))
