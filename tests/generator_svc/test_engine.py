"""The engine on a runner whose cache holds token ids, so that every mistake changes an answer."""

import random
import threading
import time

import numpy as np
import pytest

from generator_svc.admission import QueueFull
from generator_svc.metering import REPREFILL
from generator_svc.prefill_cost import PrefillCostModel
from generator_svc.sequence import FinishReason, SamplingParams
from tests.fakes import EOS, VOCABULARY, ScriptedRunner, greedy, scripted_logits
from tests.generator_svc.engine_bench import GREEDY, Bench


def _prompts(seed, count, longest=40):
    draw = random.Random(seed)
    shared = [draw.randrange(VOCABULARY) for _ in range(longest)]
    for _ in range(count):
        own = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, longest // 2))]
        yield shared[: draw.choice([0, 0, 5, 17, longest // 2])] + own


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_gives_each_request_its_own_answer_and_every_nanosecond_an_owner(seed):
    """With random arrivals, stops, cancellations and failed runs; slots are freed, times add up."""
    draw = random.Random(seed)
    bench = Bench(
        slots=draw.choice([1, 2, 5]),
        reuse=draw.random() < 0.7,
        seed=seed,
        max_num_batched_tokens=draw.choice([16, 128]),
        max_prefill_batch_size=draw.choice([0, 1, 4]),
        min_reused_tokens=draw.choice([2, 20]),
    )
    bench.runner.fails = lambda slots: OSError("run") if draw.random() < 0.01 else None
    groups, cut = [], set()
    prompts = list(_prompts(seed, 40))
    while prompts or bench.scheduler.has_work:
        while prompts and draw.random() < 0.5:
            n = draw.choice([1, 1, 1, 3, 7])
            groups.append(bench.submit(prompts.pop(), draw.randrange(1, 20), n=n))
        if groups and draw.random() < 0.1:
            group = draw.choice(groups)
            cut.add(group)
            if draw.random() < 0.5:
                bench.engine.cancel(group)
            else:
                bench.engine.stop(group, draw.randrange(group.request.n))
        bench.step()
        if draw.random() < 0.3:
            bench.engine.reprefill()
    bench.finish()

    for group in groups:
        wanted = greedy(group.request.prompt, group.request.max_new_tokens)
        for index in range(group.request.n):
            got = bench.tokens[group][index]
            whole = group not in cut and group not in bench.errors
            assert (wanted if whole else wanted[: len(got)]) == got
    spent = sum(s.device_nanoseconds for group in groups for s in group.sequences)
    assert bench.runner.busy == bench.meter.busy
    assert bench.meter.busy == spent + bench.meter.overhead.total()
    assert bench.meter.settled.total() == spent


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_batch_mates_do_not_change_a_request(temperature):
    """The same seed gives the same tokens alone and in a batch with others."""
    sampling = SamplingParams(temperature=temperature, seed=5, top_p=0.95)
    prompt = [3, 1, 4, 1, 5]
    alone = Bench()
    group = alone.submit(prompt, 20, sampling=sampling, n=2)
    alone.finish()
    crowd = Bench(slots=6)
    for other in _prompts(1, 9):
        crowd.submit(other, 12, sampling=SamplingParams(seed=len(other)))
    crowd.step()
    same = crowd.submit(prompt, 20, sampling=sampling, n=2)
    crowd.finish()

    assert alone.tokens[group] == crowd.tokens[same]


def _scored(prompt, top):
    """Logprob and top tokens for each token but the first, computed prefix by prefix."""
    for place in range(1, len(prompt)):
        logits = scripted_logits(prompt[:place]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        yield logprobs[prompt[place]], np.argsort(-logits, kind="stable")[:top].tolist()


def _assert_scored(group, top):
    found, expected = group.prompt_logprobs, list(_scored(group.request.prompt, top))
    assert [tuple(ids) for _, ids in expected] == [entry.top_token_ids for entry in found]
    assert pytest.approx([logprob for logprob, _ in expected]) == [e.logprob for e in found]


@pytest.mark.parametrize("batch_size", [0, 4])
def test_prompts_are_scored_whatever_else_there_is(batch_size):
    """In a batch, with a prefix in the cache, in chunks, for several choices: each token gets its
    log-probability, and the answer is the same as without."""
    bench = Bench(
        slots=6, slot_length=256, max_num_batched_tokens=160, max_prefill_batch_size=batch_size
    )
    prompts = list(_prompts(4, 8, longest=180))
    for prompt in prompts:
        bench.submit(prompt, 5)
    bench.finish()
    scored = [
        bench.submit(prompt, 5, n=n, prompt_logprobs=n) for n, prompt in enumerate(prompts, start=1)
    ]
    for prompt in prompts:
        bench.submit(prompt, 5)
    bench.finish()

    for n, group in enumerate(scored, start=1):
        _assert_scored(group, n)
        assert [greedy(group.request.prompt, 5)] * n == list(bench.tokens[group].values())
        assert 0 == group.sequences[0].cached_prompt_tokens
    assert bench.runner.busy == bench.meter.busy


def test_a_choice_that_is_stopped_leaves_the_scores_to_the_next():
    """The prompt is prefilled again, and scored once."""
    prompt = next(_prompts(2, 1, longest=300))[:100]
    bench = Bench(slot_length=256, max_num_batched_tokens=40)
    group = bench.submit([*prompt, *range(2, 40)], 3, n=2, prompt_logprobs=1)
    bench.step()
    bench.engine.stop(group, 0)
    bench.finish()

    _assert_scored(group, 1)
    assert greedy(group.request.prompt, 3) == bench.tokens[group][1]


def test_bad_logits_inside_a_prompt_end_the_request_that_asked():
    """Even if the last token's logits are good; other requests are not affected."""

    def logits(context):
        row = scripted_logits(context)
        if len(context) == 7:
            row[3] = np.nan
        return row

    bench = Bench(runner=ScriptedRunner(4, 64, logits))
    prompt = list(range(2, 22))
    group, other = bench.submit(prompt, 3, prompt_logprobs=0), bench.submit(prompt, 3)
    bench.finish()

    assert "not finite" in str(bench.errors[group])
    assert greedy(prompt, 3) == bench.tokens[other][0]
    assert bench.runner.busy == bench.meter.busy


def test_a_step_counts_its_tokens_however_they_are_computed():
    """In batched prompts, without padding, in chunks and in rows; idle rows do not count."""
    bench = Bench(max_num_batched_tokens=64, max_prefill_batch_size=4)
    bench.submit(list(range(2, 22)), 2, stop_token_ids=frozenset())
    bench.submit(list(range(3, 20)), 2, stop_token_ids=frozenset())
    bench.step()
    assert len(bench.runner.plans[-1].batches) == 1
    bench.finish()

    assert {37: 1, 2: 1} == dict(bench.meter.steps)


def test_prefix_cache_changes_nothing_but_the_work():
    """A second request with the same prefix computes less and gets the same answer."""
    prompt = list(range(2, 34))
    runs = {}
    for reuse in (True, False):
        bench = Bench(reuse=reuse)
        bench.submit(prompt, 4)
        bench.finish()
        before = bench.runner.prefilled_tokens
        group = bench.submit([*prompt, 40, 41], 4)
        bench.finish()
        work = bench.runner.prefilled_tokens - before
        runs[reuse] = bench.tokens[group][0], work, group.sequences[0].cached_prompt_tokens

    assert runs[True][0] == runs[False][0]
    assert (2, 32) == runs[True][1:]
    assert (34, 0) == runs[False][1:]


def test_tokens_of_an_answer_are_not_reused():
    """Only tokens computed as a prompt are reused, so that the cache never changes an answer."""
    prompt = list(range(2, 20))
    bench = Bench()
    group = bench.submit(prompt, 6)
    bench.finish()
    following = bench.submit([*prompt, *bench.tokens[group][0], 9, 9, 9], 2)
    bench.finish()

    assert len(prompt) == following.sequences[0].cached_prompt_tokens


def test_an_answer_computed_anew_is_reused():
    """The next turn prefills only its new tokens; re-prefilling is overhead that no one pays."""
    prompt = list(range(2, 20))
    bench = Bench()
    group = bench.submit(prompt, 40, stop_token_ids=frozenset())
    bench.finish()
    paid = bench.meter.settled.total()
    for _ in range(3):
        bench.engine.reprefill()
    chunks = [len(chunk.token_ids) for plan in bench.runner.plans[-2:] for chunk in plan.chunks]
    following = bench.submit([*prompt, *bench.tokens[group][0], 9, 9, 9], 2)
    bench.finish()

    assert [32, 8] == chunks
    assert len(prompt) + 40 == following.sequences[0].cached_prompt_tokens
    assert greedy(following.request.prompt, 2) == bench.tokens[following][0]
    assert paid == group.sequences[0].device_nanoseconds
    assert bench.meter.overhead[REPREFILL] > 0
    assert bench.runner.busy == bench.meter.busy


def test_an_answer_that_cannot_be_computed_is_forgotten(caplog):
    """What failed is neither reused nor retried forever."""
    bench = Bench()
    group = bench.submit(list(range(2, 20)), 12, stop_token_ids=frozenset())
    bench.finish()
    bench.runner.fails = lambda slots: OSError("device")
    bench.engine.reprefill()
    bench.runner.fails = lambda slots: None
    assert not bench.scheduler.has_reprefills
    following = bench.submit([*range(2, 20), *bench.tokens[group][0], 9, 9], 2)
    bench.finish()

    assert "device" in caplog.text
    assert 18 == following.sequences[0].cached_prompt_tokens
    assert greedy(following.request.prompt, 2) == bench.tokens[following][0]


def test_an_engine_at_rest_computes_answers_until_it_has_work():
    """It re-prefills them by itself, and the next turn, which wakes it, finds them cached."""
    bench = Bench()
    prompt = list(range(2, 20))
    bench.engine.start()
    for count in (20, 3):
        group = bench.submit(prompt, count, stop_token_ids=frozenset())
        while not bench.finished[group] or (bench.scheduler.has_reprefills and not bench.faults):
            time.sleep(0.01)
        prompt = [*prompt, *bench.tokens[group][0], 9, 9]
    bench.engine.close()

    assert 18 + 20 == group.sequences[0].cached_prompt_tokens
    assert not bench.faults


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("slots", [2, 8])
def test_choices_share_one_prefill(slots, reuse):
    """Seven choices prefill their prompt once, even with fewer slots than choices."""
    prompt = list(range(2, 30))
    bench = Bench(slots=slots, reuse=reuse)
    group = bench.submit(prompt, 5, n=7, sampling=SamplingParams(temperature=1, seed=3))
    bench.finish()

    assert 7 == len(bench.finished[group])
    if reuse or slots == 8:
        assert len(prompt) == bench.runner.prefilled_tokens
    assert len({tuple(tokens) for tokens in bench.tokens[group].values()}) > 1


def test_choices_draw_by_seed_plus_index():
    """Choice i of seed s is choice 0 of seed s + i."""
    prompt = [5, 6, 7, 8]
    bench = Bench()
    group = bench.submit(prompt, 8, n=3, sampling=SamplingParams(seed=11))
    others = [bench.submit(prompt, 8, sampling=SamplingParams(seed=11 + i)) for i in range(3)]
    bench.finish()

    assert [bench.tokens[other][0] for other in others] == [
        bench.tokens[group][i] for i in range(3)
    ]


def test_stopping_the_first_choice_before_its_prompt_is_computed_leaves_the_others():
    """The next choice takes over the prefill."""
    prompt = list(range(2, 40))
    bench = Bench()
    group = bench.submit(prompt, 5, n=3)
    bench.step()
    bench.engine.stop(group, 0)
    bench.finish()

    assert {0, 1, 2} == bench.finished[group]
    assert [] == bench.tokens[group][0]
    assert greedy(prompt, 5) == bench.tokens[group][1] == bench.tokens[group][2]


def test_a_stopped_choice_finishes_with_counts_and_frees_its_slot():
    """One choice ends at once, the other continues."""
    bench = Bench()
    group = bench.submit([7, 8, 9], 12, n=2, stop_token_ids=frozenset())
    bench.step()
    bench.step()
    bench.engine.stop(group, 0)
    bench.step()

    assert {0} == bench.finished[group]
    assert FinishReason.STOPPED is group.sequences[0].finish_reason
    assert 1 == bench.cache.used_slots
    bench.finish()
    assert greedy([7, 8, 9], 12, eos=None) == bench.tokens[group][1]


@pytest.mark.parametrize("steps", range(6))
def test_cancelling_frees_everything_wherever_the_request_is(steps):
    """Queued, in prefill or decoding: one step later nothing is held."""
    bench = Bench(slots=1, max_num_batched_tokens=8)
    first = bench.submit(list(range(2, 30)), 4)
    second = bench.submit(list(range(30, 60)), 4)
    for _ in range(steps):
        bench.step()
    bench.engine.cancel(first)
    bench.engine.cancel(second)
    bench.step()

    assert 0 == bench.cache.used_slots
    assert not bench.scheduler.has_work
    bench.finish()


def test_running_streams_wait_for_a_bounded_piece_of_a_long_prompt():
    """While a stream decodes, a step prefills only within its time budget, and decodes too."""
    bench = Bench(slots=2, slot_length=256, prefill_tokens=8, max_num_batched_tokens=64)
    bench.submit([5, 6], 60, stop_token_ids=frozenset())
    bench.step()
    bench.submit(list(range(2, 62)) * 3, 2)
    for _ in range(30):
        bench.step()
        plan = bench.runner.plans[-1]
        assert sum(len(chunk.token_ids) for chunk in plan.chunks) <= 8
        assert any(not row.is_idle for row in plan.rows)
    bench.finish()


def test_no_chunk_has_a_lone_token():
    """A single token is computed by a kernel that rounds differently, so no prompt ends in one."""
    for length in range(2, 50):
        bench = Bench(prefill_tokens=8, max_num_batched_tokens=8)
        bench.submit([3, 4, 5], 30, stop_token_ids=frozenset())
        bench.submit([9] * length, 2)
        bench.finish()

        chunks = [len(c.token_ids) for plan in bench.runner.plans for c in plan.chunks]
        assert min(chunks) >= 2


def test_failed_run_ends_those_in_it_and_no_one_else():
    """They get the error, others continue, and what the failed ones computed is not reused."""
    bench = Bench(slots=3)
    victim = bench.submit([9] * 20, 5)
    bench.step()
    other = bench.submit([4, 5, 6], 5)
    slot = victim.sequences[0].slot
    bench.runner.fails = lambda slots: OSError("device") if slots == [slot] else None
    bench.finish()

    assert "device" == str(bench.errors[victim])
    assert greedy([4, 5, 6], 5) == bench.tokens[other][0]
    bench.runner.fails = lambda slots: None
    again = bench.submit([9] * 20, 5)
    bench.finish()
    assert 0 == again.sequences[0].cached_prompt_tokens
    assert greedy([9] * 20, 5) == bench.tokens[again][0]


def test_failed_runs_do_not_make_prefill_look_fast():
    """They end early: otherwise longer chunks would delay streams, and Retry-After would be too
    short."""
    bench = Bench(slot_length=512, max_num_batched_tokens=512)
    bench.scheduler.prefill_cost = PrefillCostModel()
    bench.submit([9] * 100, 1)
    bench.finish()
    before = bench.engine.prefill_seconds(100)
    bench.runner.fails = lambda slots: OSError("device")
    for value in range(5):
        bench.submit([value] * 100, 1)
    bench.finish()

    assert 5 == len(bench.errors)
    assert before == bench.engine.prefill_seconds(100)


def test_not_a_number_fails_only_the_row_it_is_in():
    """NaN logits fail their own request only."""

    def logits(context):
        row = scripted_logits(context)
        return np.full_like(row, np.nan) if context[0] == 13 and len(context) > 5 else row

    bench = Bench(runner=ScriptedRunner(4, 64, logits))
    bad = bench.submit([13, 2, 3], 8, n=2)
    good = bench.submit([14, 2, 3], 8)
    bench.finish()

    assert bad in bench.errors
    assert greedy([14, 2, 3], 8) == bench.tokens[good][0]


@pytest.mark.parametrize("bound", [{"max_queued_requests": 2}, {"max_queued_tokens": 5}])
def test_queue_is_bounded_by_requests_and_by_tokens(bound):
    """One more than the bound is refused, and there is room again once a request starts."""
    bench = Bench(slots=1, **bound)
    bench.submit([2, 3], 3)
    bench.submit([2, 3], 3)
    with pytest.raises(QueueFull):
        bench.submit([2, 3], 3)
    bench.step()
    bench.submit([2, 3], 3)
    bench.finish()


def test_min_new_tokens_holds_stop_tokens_back():
    """No stop token is sampled before the minimum; afterwards one may be."""
    prompt = next(p for p in ([i] for i in range(99)) if greedy(p, 1) == [EOS])
    bench = Bench()
    short = bench.submit(prompt, 9)
    long = bench.submit(prompt, 9, min_new_tokens=4)
    bench.finish()

    assert [EOS] == bench.tokens[short][0]
    assert EOS not in bench.tokens[long][0][:4]
    assert len(bench.tokens[long][0]) >= 4


def test_the_start_waits_for_what_is_prepared_on_the_engines_thread():
    """CUDA graphs belong to the thread that captures them."""
    bench = Bench()
    threads = []
    bench.engine.start(lambda: threads.append(threading.current_thread().name))
    prepared = threads.copy()
    bench.engine.close()

    assert ["engine"] == prepared


def test_an_engine_that_cannot_be_prepared_does_not_start():
    """`start` raises the error, and no fault is reported afterwards."""
    bench = Bench()
    with pytest.raises(MemoryError, match="no room"):
        bench.engine.start(_fail)
    bench.engine.close()

    assert [] == bench.faults


def _fail():
    raise MemoryError("no room")


def test_a_crash_of_the_engine_is_reported():
    """A bug in the runner ends the engine's thread and is reported."""
    bench = Bench()
    bench.runner.run = lambda plan: 1 / 0
    bench.engine.start()
    bench.engine.submit(bench.submit([2], 1, sampling=GREEDY).request)
    while not bench.faults:
        time.sleep(0.01)

    assert isinstance(bench.faults[0], ZeroDivisionError)
