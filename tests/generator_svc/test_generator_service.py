"""The generator over real gRPC on loopback: streams, stops, cancellations, refusals, metrics."""

import asyncio
import contextlib
import gc
import logging
import threading
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tests.fakes import EOS, FixedPrefillCost, greedy, scripted_logits
from tests.generator_svc.generator_stage import (
    PATIENCE_SECONDS,
    SERVICE,
    Stage,
    by_last_token,
    collected,
    long_answer,
    until_load,
)
from trivium.generator.v1 import generator_pb2 as pb
from trivium.sampling.v1.sampling_pb2 import SamplingParams
from trivium.wire.errors import INTERNAL_MESSAGE

STALLING = 0.02  # seconds per step: filling a slot of 4096 tokens takes longer than any test waits


@pytest.fixture
async def stage():
    async with Stage().running() as stage:
        yield stage


async def _error(call):
    """The status of a call that fails: code, message, and details by type."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    details = {}
    for kind in ("ErrorInfo", "BadRequest", "RetryInfo"):
        message = getattr(error_details_pb2, kind)()
        for packed in rpc_status.from_call(caught.value).details:
            if packed.Unpack(message):
                details[kind] = message
    return caught.value.code(), caught.value.details(), details


async def test_greedy_tokens_are_the_models_most_likely(stage):
    """The same as repeatedly taking the most likely token; then one finish with counts."""
    prompt = [3, 4, 5, 6]
    tokens, finished = await stage.generate(prompt, max_new_tokens=20)
    wanted = greedy(prompt, 20)

    assert {0: wanted} == tokens
    assert (len(wanted), 4) == (finished[0].completion_tokens, finished[0].prompt_tokens)
    assert finished[0].device_nanoseconds > 0


async def test_finish_reason_is_stop_or_length(stage):
    """A stop token is the last of the tokens; a length limit just cuts."""
    prompt = next([i] for i in range(2, 60) if len(greedy([i], 30)) in range(3, 30))
    wanted = greedy(prompt, 30)
    _, stop = await stage.generate(prompt)
    tokens, length = await stage.generate(prompt, max_new_tokens=2)
    own, own_stop = await stage.generate(prompt, stop_token_ids=[wanted[1]])

    assert pb.FINISH_REASON_STOP_TOKEN == stop[0].reason
    assert pb.FINISH_REASON_LENGTH == length[0].reason
    assert {0: wanted[:2]} == tokens
    assert {0: wanted[: wanted.index(wanted[1]) + 1]} == own
    assert pb.FINISH_REASON_STOP_TOKEN == own_stop[0].reason


async def test_many_calls_at_once_get_their_own_answers(stage):
    """More calls than slots, some with a common prefix."""
    prompts = [[2, 3, 4, 5, value, value % 3] for value in range(6, 30)]
    answers = await asyncio.gather(*(stage.generate(p, max_new_tokens=9) for p in prompts))

    assert [{0: greedy(prompt, 9)} for prompt in prompts] == [tokens for tokens, _ in answers]


async def test_choices_are_sampled_and_finish_separately(stage):
    """n sampled choices are the same again with the same seed, and each has its own finish."""
    fields = {"n": 5, "max_new_tokens": 8, "ignore_eos": True}
    fields["sampling"] = SamplingParams(temperature=1.5, seed=3)
    tokens, finished = await stage.generate([9, 8, 7], **fields)
    again, _ = await stage.generate([9, 8, 7], **fields)

    assert tokens == again
    assert len({tuple(drawn) for drawn in tokens.values()}) > 1
    assert {0, 1, 2, 3, 4} == finished.keys()
    assert {8} == {last.completion_tokens for last in finished.values()}


async def test_logprobs_come_with_each_token(stage):
    """As many as requested, with the greedy token first."""
    call = await stage.call([5, 6], max_new_tokens=6, top_logprobs=3)
    updates = [update async for message in call for update in message.updates]
    token_ids = [token for update in updates for token in update.token_ids]
    logprobs = [logprob for update in updates for logprob in update.logprobs]

    assert greedy([5, 6], 6) == token_ids == [one.top_token_ids[0] for one in logprobs]
    assert {3} == {len(one.top_logprobs) for one in logprobs}
    assert all(one.logprob == one.top_logprobs[0] for one in logprobs)


async def test_logprobs_of_the_prompt_come_with_the_first_message(stage):
    """One for each prompt token but the first; later messages have none."""
    prompt = [5, 6, *greedy([5, 6], 4, eos=None)]
    call = await stage.call(prompt, max_new_tokens=2, n=2, prompt_logprobs=2)
    first, *others = [message async for message in call]
    found = first.prompt_logprobs

    assert prompt[2:] == [entry.top_token_ids[0] for entry in found[1:]]
    assert [2] * 5 == [len(entry.top_logprobs) for entry in found]
    assert [1] * 4 == [entry.rank for entry in found[1:]]
    assert all(entry.logprob == entry.top_logprobs[0] for entry in found[1:])
    assert not any(message.prompt_logprobs for message in others)


async def test_prompt_of_one_token_has_no_logprobs(stage):
    """Its only token has no predecessor."""
    tokens, _ = await stage.generate([5], max_new_tokens=2, prompt_logprobs=0)

    assert greedy([5], 2) == tokens[0]


async def test_a_stopped_choice_finishes_with_exact_counts_and_the_others_go_on(stage):
    """Stopping indices that do not exist has no effect."""
    stage.runner.delay = 0.002
    call = await stage.call([5, 6], half_close=False, n=2, max_new_tokens=50, ignore_eos=True)
    messages = [await anext(aiter(call))]
    for index in (7, -1, 0):
        await call.write(pb.GenerateRequest(stop=pb.StopSequence(index=index)))
    await call.done_writing()
    messages += [message async for message in call]
    tokens, finished = collected(messages)

    assert pb.FINISH_REASON_STOPPED == finished[0].reason
    assert len(tokens[0]) == finished[0].completion_tokens < 50
    assert greedy([5, 6], 50, eos=None) == tokens[1]
    assert tokens[1][: len(tokens[0])] == tokens[0]
    assert len(tokens[0]) + 50 == stage.metric("trivium_engine_generation_tokens_total")


async def test_queued_call_can_be_stopped():
    """It has no token, and is no failure."""
    stage = Stage(slots=1)
    async with stage.running():
        stage.runner.delay = 0.02
        running = await stage.call([2], ignore_eos=True)
        await running.read()
        waiting = await stage.call([2], half_close=False)
        await stage.until(lambda load: load.waiting_sequences)
        await waiting.write(pb.GenerateRequest(stop=pb.StopSequence(index=0)))
        await waiting.done_writing()
        tokens, finished = collected([message async for message in waiting])
        running.cancel()

    assert {0: []} == tokens
    assert pb.FINISH_REASON_STOPPED == finished[0].reason


async def test_tokens_are_merged_while_a_message_is_written():
    """The first token is sent at once; the rest waits for the reader, and nothing is lost."""
    stage = Stage(slot_length=1024, logits=by_last_token)
    run, is_read = stage.runner.run, threading.Event()

    def run_once_read(plan):
        if plan.rows:  # on a busy machine the reader might not wake before several tokens
            assert is_read.wait(PATIENCE_SECONDS)
        return run(plan)

    stage.runner.run = run_once_read
    async with stage.running():
        start = pb.StartGeneration(
            revision="r1", prompt_token_ids=[4, 5], max_new_tokens=400, n=2, top_logprobs=1
        )

        async def requests():
            yield pb.GenerateRequest(start=start)

        responses = stage.service.Generate(requests(), None)
        messages = [await anext(responses)]
        is_read.set()
        await stage.until(lambda load: not load.running_sequences and not load.waiting_sequences)
        messages += [message async for message in responses]

    tokens, finished = collected(messages)
    assert [1, 2] == [len(message.updates) for message in messages]
    assert {0: long_answer(5, 400), 1: long_answer(5, 400)} == tokens
    assert {0, 1} == finished.keys()
    assert all(len(u.token_ids) == len(u.logprobs) for m in messages for u in m.updates)


@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_message_that_cannot_be_decoded(has_begun, caplog):
    """The call ends at once with an error, at its first message or later, and nothing is
    logged as an error."""
    stage = Stage(slot_length=4096, logits=by_last_token)
    async with stage.running():
        stage.runner.delay = 0.01
        call = stage.channel.stream_stream(f"/{SERVICE}/Generate")()
        if has_begun:
            start = pb.StartGeneration(
                revision="r1", prompt_token_ids=[4, 5], max_new_tokens=4000, ignore_eos=True
            )
            await call.write(pb.GenerateRequest(start=start).SerializeToString())
            await anext(aiter(call))
        await call.write(b"\xff\xff\xff")
        code, message, details = await _error(call)
        await stage.until_free()
    gc.collect()

    assert grpc.StatusCode.INVALID_ARGUMENT is code
    assert "The message cannot be decoded." == message
    assert "INVALID_VALUE" == details["ErrorInfo"].reason
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_slow_reader_loses_nothing_and_blocks_nobody():
    """The engine finishes long before the reader continues, with fewer messages than tokens."""
    stage = Stage(slot_length=4096, logits=by_last_token)
    async with stage.running():
        call = await stage.call([4, 5], max_new_tokens=1500, top_logprobs=20)
        messages = [await anext(aiter(call))]
        await stage.until_free()
        messages += [message async for message in call]

    tokens, _ = collected(messages)
    assert {0: long_answer(5, 1500)} == tokens
    assert len(messages) < 1500


async def _decoding(stage):
    call = await stage.call([4, 5], half_close=False)
    await anext(aiter(call))
    return call


async def _prefilling(stage):
    call = await stage.call([7] * 4000, half_close=False)
    await stage.until(lambda load: load.running_sequences)
    return call


async def _queued(stage):
    call = await stage.call([7] * 100, half_close=False)
    await stage.until(lambda load: load.waiting_sequences)
    return call


@pytest.mark.parametrize("met", [_queued, _prefilling, _decoding])
async def test_a_cancelled_call_frees_what_it_holds(met, caplog):
    """Queued, in prefill or decoding, with the request stream still open; no error is logged."""
    stage = Stage(slots=1, slot_length=4096, logits=by_last_token)
    async with stage.running():
        stage.runner.delay = STALLING
        first = await _decoding(stage) if met is _queued else None
        call = await met(stage)
        call.cancel()
        if first is not None:
            await stage.until(lambda load: not load.waiting_sequences)
            await stage.until(lambda load: not load.waiting_prompt_tokens)
            first.cancel()
        await stage.until_free()
        stage.runner.delay = 0.0
        tokens, _ = await stage.generate([4, 5], max_new_tokens=3)

    assert {0: long_answer(5, 3)} == tokens
    assert [] == [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_deadline_frees_what_the_call_holds():
    """The caller gets DEADLINE_EXCEEDED."""
    stage = Stage(slots=1, slot_length=4096, logits=by_last_token)
    async with stage.running():
        stage.runner.delay = STALLING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in await stage.call([4, 5], seconds=0.3):
                pass
        await stage.until_free()

    assert grpc.StatusCode.DEADLINE_EXCEEDED is caught.value.code()


async def test_retry_delay_is_the_queues_prefill_time():
    """By the measured prefill time: ten tokens at two seconds each."""

    class SlowPrefill(FixedPrefillCost):
        def cost(self, start):
            return 2e9

    stage = Stage(slots=1, slot_length=4096, logits=by_last_token, cost=SlowPrefill(8), requests=1)
    async with stage.running():
        stage.runner.delay = 0.002
        running = await _decoding(stage)
        waiting = await stage.call([8] * 10, max_new_tokens=3)
        await stage.until(lambda load: load.waiting_sequences)
        _, _, details = await _error(await stage.call([8, 9]))
        running.cancel()
        waiting.cancel()

    assert 20 == details["RetryInfo"].retry_delay.seconds


@pytest.mark.parametrize("bound", [{"requests": 1}, {"tokens": 3}])
async def test_full_queue_is_refused_with_a_retry_delay(bound):
    """Running and waiting calls are not affected."""
    stage = Stage(slots=1, slot_length=4096, logits=by_last_token, **bound)
    async with stage.running():
        stage.runner.delay = 0.002
        running = await _decoding(stage)
        waiting = await stage.call([8, 9], max_new_tokens=3)
        await stage.until(lambda load: load.waiting_sequences)
        code, _, details = await _error(await stage.call([8, 9]))
        running.cancel()
        tokens, _ = collected([message async for message in waiting])

    assert grpc.StatusCode.RESOURCE_EXHAUSTED is code
    assert ("QUEUE_FULL", "trivium") == (details["ErrorInfo"].reason, details["ErrorInfo"].domain)
    assert 1 <= details["RetryInfo"].retry_delay.seconds <= 60
    assert {0: long_answer(9, 3)} == tokens


@pytest.mark.parametrize(
    ("fields", "code", "reason", "field"),
    [
        ({"prompt_token_ids": [64]}, "INVALID_ARGUMENT", "INVALID_VALUE", "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "INVALID_ARGUMENT", "INVALID_VALUE", "prompt_token_ids"),
        (
            {"prompt_token_ids": [2] * 64},
            "OUT_OF_RANGE",
            "CONTEXT_LENGTH_EXCEEDED",
            "prompt_token_ids",
        ),
        ({"prompt_token_ids": []}, "INVALID_ARGUMENT", "EMPTY_ARRAY", "prompt_token_ids"),
        ({"revision": "r2"}, "FAILED_PRECONDITION", "REVISION_MISMATCH", None),
        ({"n": 9}, "INVALID_ARGUMENT", "INTEGER_ABOVE_MAX_VALUE", "n"),
        (
            {"sampling": SamplingParams(temperature=3.0)},
            "INVALID_ARGUMENT",
            "DECIMAL_ABOVE_MAX_VALUE",
            "sampling.temperature",
        ),
    ],
)
async def test_refusals_carry_status_reason_and_field(stage, fields, code, reason, field):
    """As google.rpc details, and nothing is queued."""
    fields = {"revision": "r1", "prompt_token_ids": [3]} | fields
    call = stage.stub.Generate()
    await call.write(pb.GenerateRequest(start=pb.StartGeneration(**fields)))
    got, message, details = await _error(call)

    assert grpc.StatusCode[code] is got
    assert reason == details["ErrorInfo"].reason
    assert message
    if field is None:
        assert "BadRequest" not in details
    else:
        assert [field] == [fault.field for fault in details["BadRequest"].field_violations]


async def test_bad_words_are_not_generated(stage):
    """The greedy answer takes another token where it would complete one."""
    wanted, _ = await stage.generate([3], max_new_tokens=9)
    word = pb.TokenSequence(token_ids=wanted[0][:3])
    tokens, _ = await stage.generate([3], max_new_tokens=9, bad_words=[word])

    assert 9 == len(tokens[0])
    assert wanted[0][:2] == tokens[0][:2]
    assert wanted[0][2] != tokens[0][2]


async def test_no_token_left_to_generate_is_the_callers_error(stage):
    """The end-of-sequence token is the only one allowed, but may not come yet."""
    sampling = SamplingParams(allowed_token_ids=[EOS])
    tokens, finished = await stage.generate([3], sampling=sampling, n=2)
    call = await stage.call([3], sampling=sampling, min_new_tokens=1)
    got, message, details = await _error(call)

    assert {0: [EOS], 1: [EOS]} == tokens
    assert {pb.FINISH_REASON_STOP_TOKEN} == {end.reason for end in finished.values()}
    assert grpc.StatusCode.INVALID_ARGUMENT is got
    assert "INVALID_PARAMETER_COMBINATION" == details["ErrorInfo"].reason
    assert "'allowed_token_ids'" in message
    [fault] = details["BadRequest"].field_violations
    assert "sampling.allowed_token_ids" == fault.field


@pytest.mark.parametrize("first", [pb.GenerateRequest(stop=pb.StopSequence()), None])
async def test_first_message_must_be_a_start(stage, first):
    """Neither another command nor an empty stream is accepted."""
    call = stage.stub.Generate()
    if first is not None:
        await call.write(first)
    await call.done_writing()
    code, _, details = await _error(call)

    assert grpc.StatusCode.INVALID_ARGUMENT is code
    assert "MISSING_REQUIRED_PARAMETER" == details["ErrorInfo"].reason


async def test_a_second_start_changes_nothing(stage):
    """Only the first message starts a generation."""
    call = await stage.call([5, 6], half_close=False, max_new_tokens=4, ignore_eos=True)
    with contextlib.suppress(asyncio.InvalidStateError):  # the answer may already be complete
        await call.write(pb.GenerateRequest(start=pb.StartGeneration(prompt_token_ids=[999])))
        await call.done_writing()

    assert greedy([5, 6], 4, eos=None) == collected([m async for m in call])[0][0]


async def test_bad_logits_fail_their_request_with_a_generic_message(caplog):
    """The reason is logged, not sent to the caller; other calls go on."""

    def logits(context):
        row = scripted_logits(context)
        return row * np.nan if context[0] == 13 and len(context) > 5 else row

    stage = Stage(logits=logits)
    async with stage.running():
        bad = await stage.call([13, 2, 3], n=2, max_new_tokens=30, ignore_eos=True)
        good = asyncio.create_task(stage.generate([14, 2, 3], max_new_tokens=30))
        code, message, details = await _error(bad)
        tokens, _ = await good

    assert grpc.StatusCode.INTERNAL is code
    assert INTERNAL_MESSAGE == message
    assert "INTERNAL_ERROR" == details["ErrorInfo"].reason
    assert {0: greedy([14, 2, 3], 30)} == tokens
    assert "not finite" in caplog.text


async def test_model_info_and_load_are_reported(stage):
    """As operators' tools and the tokenizer need them."""
    info = await stage.stub.GetModelInfo(pb.GetModelInfoRequest())
    load = await until_load(stage.stub)

    assert ("m", "r1", 4) == (info.id, info.revision, info.slots)
    assert pb.WatchLoadResponse(free_slots=4) == load


async def test_load_reports_respect_the_interval(stage):
    """However much changes in the meantime."""
    interval = 0.1
    began = time.monotonic()
    watch = stage.stub.WatchLoad(pb.WatchLoadRequest(min_interval_milliseconds=100))
    reports = []

    async def collect():
        async for report in watch:
            reports.append(report)

    collecting = asyncio.create_task(collect())
    while len(reports) < 4:
        await stage.generate([5, 6], max_new_tokens=4)
        await stage.generate([5, 7, 8], max_new_tokens=50, n=3)
    count, seconds = len(reports), time.monotonic() - began
    watch.cancel()
    await asyncio.gather(collecting, return_exceptions=True)

    assert count <= seconds / interval + 1


async def test_new_call_is_not_reported_as_waiting(stage):
    """It gets a free slot at once, and a call that has ended by the next report does not count."""
    watch = stage.stub.WatchLoad(pb.WatchLoadRequest(min_interval_milliseconds=300))
    idle = await watch.read()
    await asyncio.sleep(0.4)  # the load is checked again and has not changed
    await stage.generate([5, 6, 7, 8], max_new_tokens=2)

    assert pb.WatchLoadResponse(free_slots=4) == idle
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.6):
            await watch.read()


@pytest.mark.parametrize("milliseconds", [0, 9, 5001])
async def test_load_interval_out_of_range_is_refused(stage, milliseconds):
    """An interval out of range is refused, and the field is named."""
    request = pb.WatchLoadRequest(min_interval_milliseconds=milliseconds)
    code, message, _ = await _error(stage.stub.WatchLoad(request))

    assert grpc.StatusCode.INVALID_ARGUMENT is code
    assert "'min_interval_milliseconds'" in message


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_health_is_serving(stage, name):
    """By service and for the whole process."""
    stub = health_pb2_grpc.HealthStub(stage.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))

    assert health_pb2.HealthCheckResponse.SERVING == answer.status


async def test_reflection_lists_the_service(stage):
    """grpcurl works without the .proto files."""
    stub = reflection_pb2_grpc.ServerReflectionStub(stage.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = [one async for one in stub.ServerReflectionInfo(iter([request]))]

    assert SERVICE in {service.name for service in answer.list_services_response.service}


async def test_metrics_add_up_and_gauges_return_to_zero():
    """After finished, stopped, cancelled and failed calls nothing is held, and times add up."""
    stage = Stage(slots=3)
    async with stage.running():
        stage.runner.delay = 0.002
        stopped = await stage.call([2, 3], half_close=False, n=2, ignore_eos=True)
        await anext(aiter(stopped))
        await stopped.write(pb.GenerateRequest(stop=pb.StopSequence(index=0)))
        await _drained(stopped)
        plans = stage.runner.plans
        failing = len(plans) + 40
        stage.runner.fails = lambda _: OSError("run") if len(plans) == failing else None
        calls = [
            await stage.call([2, 3, value], half_close=False, n=1 + value % 3, ignore_eos=True)
            for value in range(4, 24)
        ]
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*map(_drained, calls[1::2]))
        await stage.until_free()

    name = "trivium_device_{}_nanoseconds_total"
    busy = stage.metric(name.format("busy"))
    requests, overhead = (stage.metric(name.format(part)) for part in ("request", "overhead"))
    assert busy == requests + overhead == stage.runner.busy
    assert stage.metric(name.format("request"), outcome="failed") > 0
    assert 1 == stage.metric("trivium_engine_calls_total", finished_reason="stopped")
    for gauge in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "trivium_slots_in_use",
        "trivium_waiting_prompt_tokens",
    ):
        assert 0 == stage.metric(gauge)
    assert 3 == stage.metric("trivium_slots")


async def _drained(call):
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass


async def test_metrics_count_what_callers_got(stage):
    """Tokens, cached tokens, latencies and finish reasons, by names that vLLM's users know."""
    prompt = list(range(2, 22))
    for n in (1, 2):
        await stage.generate(prompt, n=n, max_new_tokens=5, ignore_eos=True)

    assert 40 == stage.metric("trivium_engine_prompt_tokens_total", model_name="m")
    assert 40 == stage.metric("vllm:prefix_cache_queries_total")
    assert 18 == stage.metric("vllm:prefix_cache_hits_total")
    assert 15 == stage.metric("trivium_engine_generation_tokens_total")
    assert 2 == stage.metric("trivium_engine_time_to_first_token_seconds_count")
    assert 0 < stage.metric("trivium_engine_time_to_first_token_seconds_sum") < PATIENCE_SECONDS
    assert 12 == stage.metric("trivium_engine_inter_token_latency_seconds_count")
    assert 2 == stage.metric("trivium_engine_calls_total", finished_reason="length")


async def test_phases_of_a_call_add_up(stage):
    """Queue, prefill and decode are observed once for each finished call; prefill and decode add up
    to the inference time."""
    async with asyncio.TaskGroup() as group:
        for value in range(2, 12):
            group.create_task(stage.generate([value, 3], n=2, max_new_tokens=5, ignore_eos=True))

    def total(phase, part):
        return stage.metric(f"vllm:request_{phase}_time_seconds_{part}", model_name="m")

    for phase in ("queue", "prefill", "decode", "inference"):
        assert 10 == total(phase, "count")
        assert total(phase, "sum") > 0
    assert total("inference", "sum") == pytest.approx(
        total("prefill", "sum") + total("decode", "sum")
    )


async def test_steps_are_counted_by_their_tokens(stage):
    """A prompt of 12 tokens and four decoded ones: five steps, of 12 tokens and of 1."""
    await stage.generate(list(range(2, 14)), max_new_tokens=5, ignore_eos=True)

    name = "vllm:iteration_tokens_total"
    assert 16 == stage.metric(f"{name}_sum")
    assert 5 == stage.metric(f"{name}_count")
    assert 4 == stage.metric(f"{name}_bucket", le="1.0")
    assert 5 == stage.metric(f"{name}_bucket", le="16.0")


async def test_cache_usage_counts_tokens(stage):
    """Of four slots of 64 tokens, a running sequence uses as much as it has tokens, not a slot."""
    stage.runner.delay = 0.1
    call = await stage.call(list(range(2, 34)), ignore_eos=True)
    await call.read()
    usage = stage.metric("vllm:kv_cache_usage_perc")
    call.cancel()

    assert 32 / 256 <= usage < 64 / 256


async def test_refused_calls_are_counted_by_reason():
    """Refusals by a full queue or for a wrong field start at 0 and do not count as calls."""
    stage = Stage(slots=1, requests=1)
    async with stage.running():
        assert 0 == stage.metric("trivium_engine_rejections_total", reason="queue_full")
        stage.runner.delay = 0.01
        running = await stage.call([2], ignore_eos=True)
        await running.read()
        waiting = await stage.call([2], ignore_eos=True)
        await stage.until(lambda load: load.waiting_sequences)
        for fields in ({}, {"n": 0}):
            await _error(await stage.call([2], **fields))
        running.cancel()
        waiting.cancel()
        await stage.until_free()
        stage.in_flight.draining.set()
        await _error(stage.stub.Generate(iter(())))
        stage.in_flight.draining.clear()

    assert 1 == stage.metric("trivium_engine_rejections_total", reason="queue_full")
    assert 1 == stage.metric("trivium_engine_rejections_total", reason="draining")
    assert 3 == stage.metric("trivium_engine_rejections_total")
    assert 2 == stage.metric("trivium_engine_calls_total")
