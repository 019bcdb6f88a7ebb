"""The engine on a runner whose cache holds token ids, so that every mistake changes an answer."""

import itertools
import random
import threading
import time
from array import array

import numpy as np
import pytest

from generator_svc.admission import QueueFull
from generator_svc.metering import REPREFILL
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.sequence import FinishReason, SamplingParams
from tests.fakes import EOS, VOCABULARY, ScriptedRunner, greedy, scripted_logits
from tests.generator_svc.engine_harness import GREEDY, Harness


def _prompts(seed, count, longest=40):
    draw = random.Random(seed)
    shared = [draw.randrange(VOCABULARY) for _ in range(longest)]
    for _ in range(count):
        own = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, longest // 2))]
        yield shared[: draw.choice([0, 0, 5, 17, longest // 2])] + own


@pytest.mark.parametrize("seed", range(12))
def test_answers_are_right_and_device_time_adds_up_under_random_traffic(seed):
    """With random arrivals, stops, cancellations and failed runs; slots are freed, times add up."""
    draw = random.Random(seed)
    harness = Harness(
        slots=draw.choice([1, 2, 5]),
        reuse=draw.random() < 0.7,
        seed=seed,
        max_num_batched_tokens=draw.choice([16, 128]),
        max_prefill_batch_size=draw.choice([0, 1, 4]),
        min_reused_tokens=draw.choice([2, 20]),
    )
    harness.runner.fails = lambda slots: OSError("run") if draw.random() < 0.01 else None
    groups, cut = [], set()
    prompts = list(_prompts(seed, 40))
    while prompts or harness.scheduler.has_work:
        while prompts and draw.random() < 0.5:
            n = draw.choice([1, 1, 1, 3, 7])
            groups.append(harness.submit(prompts.pop(), draw.randrange(1, 20), n=n))
        if groups and draw.random() < 0.1:
            group = draw.choice(groups)
            cut.add(group)
            if draw.random() < 0.5:
                harness.engine.cancel(group)
            else:
                harness.engine.stop(group, draw.randrange(group.request.n))
        harness.step()
        if draw.random() < 0.3:
            harness.engine.reprefill()
    harness.finish()

    for group in groups:
        wanted = greedy(group.request.prompt, group.request.max_new_tokens)
        for index in range(group.request.n):
            got = harness.tokens[group][index]
            whole = group not in cut and group not in harness.errors
            assert (wanted if whole else wanted[: len(got)]) == got
    spent = sum(s.device_nanoseconds for group in groups for s in group.sequences)
    assert harness.runner.busy == harness.meter.busy
    assert harness.meter.busy == spent + harness.meter.overhead.total()
    assert harness.meter.settled.total() == spent


@pytest.mark.parametrize("bad_words", [(), tuple((t, t + u) for t in range(30) for u in range(34))])
@pytest.mark.parametrize("allowed", [[], [EOS, 2, 5, 8, 13, 21, 34, 55]])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_tokens_do_not_depend_on_the_batch(temperature, allowed, bad_words):
    """The same seed gives the same tokens alone and in a batch with others."""
    sampling = SamplingParams(
        temperature=temperature, seed=5, top_p=0.95, allowed_token_ids=array("q", allowed)
    )
    prompt = [3, 1, 4, 1, 5]
    fields = {"sampling": sampling, "n": 2, "bad_words": bad_words}
    alone = Harness()
    group = alone.submit(prompt, 20, **fields)
    alone.finish()
    crowd = Harness(slots=6)
    for other in _prompts(1, 9):
        crowd.submit(other, 12, sampling=SamplingParams(seed=len(other)))
    crowd.step()
    same = crowd.submit(prompt, 20, **fields)
    crowd.finish()

    assert alone.tokens[group] == crowd.tokens[same]
    for ids in crowd.tokens[same].values():
        assert {*ids} <= {*(allowed or range(VOCABULARY))}
        assert {*itertools.pairwise(ids)}.isdisjoint(bad_words)


def _scored(prompt, top):
    """Logprob, top tokens and rank for each token but the first, computed prefix by prefix."""
    for place in range(1, len(prompt)):
        logits = scripted_logits(prompt[:place]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        rank = sum(logits >= logits[prompt[place]])
        yield logprobs[prompt[place]], np.argsort(-logits, kind="stable")[:top].tolist(), rank


def _assert_scored(group, top):
    found, expected = group.prompt_logprobs, list(_scored(group.request.prompt, top))
    assert [tuple(ids) for _, ids, _ in expected] == [entry.top_token_ids for entry in found]
    assert pytest.approx([logprob for logprob, *_ in expected]) == [e.logprob for e in found]
    assert [rank for *_, rank in expected] == [entry.rank for entry in found]


@pytest.mark.parametrize("batch_size", [0, 4])
def test_prompt_logprobs_are_right_in_any_batch(batch_size):
    """In a batch, with a prefix in the cache, in chunks, for several choices: each token gets its
    log-probability, and the answer is the same as without."""
    harness = Harness(
        slots=6, slot_length=256, max_num_batched_tokens=160, max_prefill_batch_size=batch_size
    )
    prompts = list(_prompts(4, 8, longest=180))
    for prompt in prompts:
        harness.submit(prompt, 5)
    harness.finish()
    scored = [
        harness.submit(prompt, 5, n=n, prompt_logprobs=n)
        for n, prompt in enumerate(prompts, start=1)
    ]
    for prompt in prompts:
        harness.submit(prompt, 5)
    harness.finish()

    for n, group in enumerate(scored, start=1):
        _assert_scored(group, n)
        assert [greedy(group.request.prompt, 5)] * n == list(harness.tokens[group].values())
        assert 0 == group.sequences[0].cached_prompt_tokens
    assert harness.runner.busy == harness.meter.busy


def test_next_choice_takes_over_the_prompt_logprobs():
    """The prompt is prefilled again, and scored once."""
    prompt = next(_prompts(2, 1, longest=300))[:100]
    harness = Harness(slot_length=256, max_num_batched_tokens=40)
    group = harness.submit([*prompt, *range(2, 40)], 3, n=2, prompt_logprobs=1)
    harness.step()
    harness.engine.stop(group, 0)
    harness.finish()

    _assert_scored(group, 1)
    assert greedy(group.request.prompt, 3) == harness.tokens[group][1]


def test_bad_prompt_logits_fail_only_their_request():
    """Even if the last token's logits are good; other requests are not affected."""

    def logits(context):
        row = scripted_logits(context)
        if len(context) == 7:
            row[3] = np.nan
        return row

    harness = Harness(runner=ScriptedRunner(4, 64, logits))
    prompt = list(range(2, 22))
    group, other = harness.submit(prompt, 3, prompt_logprobs=0), harness.submit(prompt, 3)
    harness.finish()

    assert "not finite" in str(harness.errors[group])
    assert greedy(prompt, 3) == harness.tokens[other][0]
    assert harness.runner.busy == harness.meter.busy


def test_a_step_counts_its_tokens_however_they_are_computed():
    """In batched prompts, without padding, in chunks and in rows; idle rows do not count."""
    harness = Harness(max_num_batched_tokens=64, max_prefill_batch_size=4)
    harness.submit(list(range(2, 22)), 2, stop_token_ids=frozenset())
    harness.submit(list(range(3, 20)), 2, stop_token_ids=frozenset())
    harness.step()
    assert len(harness.runner.plans[-1].batches) == 1
    harness.finish()

    assert {37: 1, 2: 1} == dict(harness.meter.steps)


def test_prefix_cache_does_not_change_answers():
    """A second request with the same prefix computes less and gets the same answer."""
    prompt = list(range(2, 34))
    runs = {}
    for reuse in (True, False):
        harness = Harness(reuse=reuse)
        harness.submit(prompt, 4)
        harness.finish()
        before = harness.runner.prefilled_tokens
        group = harness.submit([*prompt, 40, 41], 4)
        harness.finish()
        work = harness.runner.prefilled_tokens - before
        runs[reuse] = harness.tokens[group][0], work, group.sequences[0].cached_prompt_tokens

    assert runs[True][0] == runs[False][0]
    assert (2, 32) == runs[True][1:]
    assert (34, 0) == runs[False][1:]


def test_tokens_of_an_answer_are_not_reused():
    """Only tokens computed as a prompt are reused, so that the cache never changes an answer."""
    prompt = list(range(2, 20))
    harness = Harness()
    group = harness.submit(prompt, 6)
    harness.finish()
    following = harness.submit([*prompt, *harness.tokens[group][0], 9, 9, 9], 2)
    harness.finish()

    assert len(prompt) == following.sequences[0].cached_prompt_tokens


def test_reprefilled_answer_is_reused():
    """The next turn prefills only its new tokens; re-prefilling is overhead that no one pays."""
    prompt = list(range(2, 20))
    harness = Harness()
    group = harness.submit(prompt, 40, stop_token_ids=frozenset())
    harness.finish()
    paid = harness.meter.settled.total()
    for _ in range(3):
        harness.engine.reprefill()
    chunks = [len(chunk.token_ids) for plan in harness.runner.plans[-2:] for chunk in plan.chunks]
    following = harness.submit([*prompt, *harness.tokens[group][0], 9, 9, 9], 2)
    harness.finish()

    assert [32, 8] == chunks
    assert len(prompt) + 40 == following.sequences[0].cached_prompt_tokens
    assert greedy(following.request.prompt, 2) == harness.tokens[following][0]
    assert paid == group.sequences[0].device_nanoseconds
    assert harness.meter.overhead[REPREFILL] > 0
    assert harness.runner.busy == harness.meter.busy


def test_failed_reprefill_is_not_retried(caplog):
    """What failed is neither reused nor retried forever."""
    harness = Harness()
    group = harness.submit(list(range(2, 20)), 12, stop_token_ids=frozenset())
    harness.finish()
    harness.runner.fails = lambda slots: OSError("device")
    harness.engine.reprefill()
    harness.runner.fails = lambda slots: None
    assert not harness.scheduler.has_reprefills
    following = harness.submit([*range(2, 20), *harness.tokens[group][0], 9, 9], 2)
    harness.finish()

    assert "device" in caplog.text
    assert 18 == following.sequences[0].cached_prompt_tokens
    assert greedy(following.request.prompt, 2) == harness.tokens[following][0]


def test_idle_engine_reprefills_answers():
    """It re-prefills them by itself, and the next turn, which wakes it, finds them cached."""
    harness = Harness()
    prompt = list(range(2, 20))
    harness.engine.start()
    for count in (20, 3):
        group = harness.submit(prompt, count, stop_token_ids=frozenset())
        while not harness.finished[group] or (
            harness.scheduler.has_reprefills and not harness.faults
        ):
            time.sleep(0.01)
        prompt = [*prompt, *harness.tokens[group][0], 9, 9]
    harness.engine.close()

    assert 18 + 20 == group.sequences[0].cached_prompt_tokens
    assert not harness.faults


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("slots", [2, 8])
def test_choices_share_one_prefill(slots, reuse):
    """Seven choices prefill their prompt once, even with fewer slots than choices."""
    prompt = list(range(2, 30))
    harness = Harness(slots=slots, reuse=reuse)
    group = harness.submit(prompt, 5, n=7, sampling=SamplingParams(temperature=1, seed=3))
    harness.finish()

    assert 7 == len(harness.finished[group])
    if reuse or slots == 8:
        assert len(prompt) == harness.runner.prefilled_tokens
    assert len({tuple(tokens) for tokens in harness.tokens[group].values()}) > 1


def test_seed_of_a_choice_is_seed_plus_index():
    """Choice i of seed s is choice 0 of seed s + i."""
    prompt = [5, 6, 7, 8]
    harness = Harness()
    group = harness.submit(prompt, 8, n=3, sampling=SamplingParams(seed=11))
    others = [harness.submit(prompt, 8, sampling=SamplingParams(seed=11 + i)) for i in range(3)]
    harness.finish()

    assert [harness.tokens[other][0] for other in others] == [
        harness.tokens[group][i] for i in range(3)
    ]


def test_stopping_the_first_choice_before_its_prompt_is_computed_leaves_the_others():
    """The next choice takes over the prefill."""
    prompt = list(range(2, 40))
    harness = Harness()
    group = harness.submit(prompt, 5, n=3)
    harness.step()
    harness.engine.stop(group, 0)
    harness.finish()

    assert {0, 1, 2} == harness.finished[group]
    assert [] == harness.tokens[group][0]
    assert greedy(prompt, 5) == harness.tokens[group][1] == harness.tokens[group][2]


def test_a_stopped_choice_finishes_with_counts_and_frees_its_slot():
    """One choice ends at once, the other continues."""
    harness = Harness()
    group = harness.submit([7, 8, 9], 12, n=2, stop_token_ids=frozenset())
    harness.step()
    harness.step()
    harness.engine.stop(group, 0)
    harness.step()

    assert {0} == harness.finished[group]
    assert FinishReason.STOPPED is group.sequences[0].finish_reason
    assert 1 == harness.cache.used_slots
    harness.finish()
    assert greedy([7, 8, 9], 12, eos=None) == harness.tokens[group][1]


@pytest.mark.parametrize("steps", range(6))
def test_cancelling_frees_everything_in_any_state(steps):
    """Queued, in prefill or decoding: one step later nothing is held."""
    harness = Harness(slots=1, max_num_batched_tokens=8)
    first = harness.submit(list(range(2, 30)), 4)
    second = harness.submit(list(range(30, 60)), 4)
    for _ in range(steps):
        harness.step()
    harness.engine.cancel(first)
    harness.engine.cancel(second)
    harness.step()

    assert 0 == harness.cache.used_slots
    assert not harness.scheduler.has_work
    harness.finish()


def test_prefill_chunks_are_bounded_while_streams_decode():
    """While a stream decodes, a step prefills only within its time budget, and decodes too."""
    harness = Harness(slots=2, slot_length=256, prefill_tokens=8, max_num_batched_tokens=64)
    harness.submit([5, 6], 60, stop_token_ids=frozenset())
    harness.step()
    harness.submit(list(range(2, 62)) * 3, 2)
    for _ in range(30):
        harness.step()
        plan = harness.runner.plans[-1]
        assert sum(len(chunk.token_ids) for chunk in plan.chunks) <= 8
        assert any(not row.is_idle for row in plan.rows)
    harness.finish()


def test_no_chunk_has_a_lone_token():
    """A single token is computed by a kernel that rounds differently, so no prompt ends in one."""
    for length in range(2, 50):
        harness = Harness(prefill_tokens=8, max_num_batched_tokens=8)
        harness.submit([3, 4, 5], 30, stop_token_ids=frozenset())
        harness.submit([9] * length, 2)
        harness.finish()

        chunks = [len(c.token_ids) for plan in harness.runner.plans for c in plan.chunks]
        assert min(chunks) >= 2


def test_failed_run_fails_only_its_requests():
    """They get the error, others continue, and what the failed ones computed is not reused."""
    harness = Harness(slots=3)
    victim = harness.submit([9] * 20, 5)
    harness.step()
    other = harness.submit([4, 5, 6], 5)
    slot = victim.sequences[0].slot
    harness.runner.fails = lambda slots: OSError("device") if slots == [slot] else None
    harness.finish()

    assert "device" == str(harness.errors[victim])
    assert greedy([4, 5, 6], 5) == harness.tokens[other][0]
    harness.runner.fails = lambda slots: None
    again = harness.submit([9] * 20, 5)
    harness.finish()
    assert 0 == again.sequences[0].cached_prompt_tokens
    assert greedy([9] * 20, 5) == harness.tokens[again][0]


def test_failed_runs_do_not_make_prefill_look_fast():
    """They end early: otherwise longer chunks would delay streams, and Retry-After would be too
    short."""
    harness = Harness(slot_length=512, max_num_batched_tokens=512)
    harness.scheduler.prefill_cost = PrefillCostModel()
    harness.submit([9] * 100, 1)
    harness.finish()
    before = harness.engine.prefill_seconds(100)
    harness.runner.fails = lambda slots: OSError("device")
    for value in range(5):
        harness.submit([value] * 100, 1)
    harness.finish()

    assert 5 == len(harness.errors)
    assert before == harness.engine.prefill_seconds(100)


def test_nan_fails_only_its_row():
    """NaN logits fail their own request only."""

    def logits(context):
        row = scripted_logits(context)
        return np.full_like(row, np.nan) if context[0] == 13 and len(context) > 5 else row

    harness = Harness(runner=ScriptedRunner(4, 64, logits))
    bad = harness.submit([13, 2, 3], 8, n=2)
    good = harness.submit([14, 2, 3], 8)
    harness.finish()

    assert bad in harness.errors
    assert greedy([14, 2, 3], 8) == harness.tokens[good][0]


@pytest.mark.parametrize("bound", [{"max_queued_requests": 2}, {"max_queued_tokens": 5}])
def test_queue_is_bounded_by_requests_and_by_tokens(bound):
    """One more than the bound is refused, and there is room again once a request starts."""
    harness = Harness(slots=1, **bound)
    harness.submit([2, 3], 3)
    harness.submit([2, 3], 3)
    with pytest.raises(QueueFull):
        harness.submit([2, 3], 3)
    harness.step()
    harness.submit([2, 3], 3)
    harness.finish()


def test_min_new_tokens_holds_stop_tokens_back():
    """No stop token is sampled before the minimum; afterwards one may be."""
    prompt = next(p for p in ([i] for i in range(99)) if greedy(p, 1) == [EOS])
    harness = Harness()
    short = harness.submit(prompt, 9)
    long = harness.submit(prompt, 9, min_new_tokens=4)
    harness.finish()

    assert [EOS] == harness.tokens[short][0]
    assert EOS not in harness.tokens[long][0][:4]
    assert len(harness.tokens[long][0]) >= 4


def test_start_waits_for_preparation_on_the_engine_thread():
    """CUDA graphs belong to the thread that captures them."""
    harness = Harness()
    threads = []
    harness.engine.start(lambda: threads.append(threading.current_thread().name))
    prepared = threads.copy()
    harness.engine.close()

    assert ["engine"] == prepared


def test_an_engine_that_cannot_be_prepared_does_not_start():
    """`start` raises the error, and no fault is reported afterwards."""
    harness = Harness()
    with pytest.raises(MemoryError, match="no room"):
        harness.engine.start(_fail)
    harness.engine.close()

    assert [] == harness.faults


def _fail():
    raise MemoryError("no room")


def test_a_crash_of_the_engine_is_reported():
    """A bug in the runner ends the engine's thread and is reported."""
    harness = Harness()
    harness.runner.run = lambda plan: 1 / 0
    harness.engine.start()
    harness.engine.submit(harness.submit([2], 1, sampling=GREEDY).request)
    while not harness.faults:
        time.sleep(0.01)

    assert isinstance(harness.faults[0], ZeroDivisionError)
