"""ChatService with a scripted generator: what callers get, and what the generator receives."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.tokenizer_svc.conftest import CONTEXT_LENGTH, Stage, running, user
from tests.tokenizer_svc.scripted_generator import (
    code_of,
    fails_after,
    finish,
    message_of,
    says,
    says_until_stopped,
    stalls_after,
    update,
)
from tokenizer_svc.models import Model
from trivium.chat.v1 import chat_pb2, completion_pb2, model_pb2
from trivium.generator.v1 import generator_pb2
from trivium.tokenizer.v1 import tokenizer_pb2
from trivium.wire.errors import ServiceError, from_rpc_error

STOP_TOKEN = generator_pb2.FINISH_REASON_STOP_TOKEN
LENGTH = generator_pb2.FINISH_REASON_LENGTH
IM_END = 2

Events = Sequence[chat_pb2.StreamChatCompletionResponse]


def one_by_one(token_ids: Sequence[int], index: int = 0) -> list[generator_pb2.GenerateResponse]:
    return [message_of(update(index, [token_id])) for token_id in token_ids]


def ended(tokens: int, index: int = 0, **more: int) -> generator_pb2.GenerateResponse:
    return message_of(update(index, [IM_END]), finish(index, STOP_TOKEN, tokens, **more))


def deltas(events: Events, index: int = 0) -> list[chat_pb2.ChoiceDelta]:
    found = [event.delta for event in events if event.HasField("delta")]
    return [delta for delta in found if delta.index == index]


def text(events: Events, index: int = 0) -> str:
    return "".join(delta.content for delta in deltas(events, index))


async def test_a_stream_is_header_deltas_usage(stage: Stage) -> None:
    """A stream has this order; the finish delta has no content, and the stop token no text."""
    token_ids = stage.encode("The capital \U0001fae0")
    stage.generator.script = says([*one_by_one(token_ids), ended(len(token_ids) + 1, cached=5)])
    events = await stage.stream()
    header, usage, last = events[0].header, events[-1].usage, events[-2].delta

    assert "The capital \U0001fae0" == text(events)
    assert (38 + 3, "chatcmpl-") == (len(header.id), header.id[:9])
    assert ("tiny", "fp_" + stage.model.revision[:10]) == (header.model, header.system_fingerprint)
    assert ("", chat_pb2.FINISH_REASON_STOP) == (last.content, last.finish_reason)
    assert not last.HasField("matched_stop")
    prompt_tokens = len(stage.generator.calls[0].start.prompt_token_ids)
    assert prompt_tokens == header.prompt_tokens == usage.prompt_tokens
    assert (len(token_ids) + 1, 5) == (usage.completion_tokens, usage.cached_prompt_tokens)
    assert 1_000 == usage.device_nanoseconds


async def test_unary_and_streaming_answers_are_equal(stage: Stage) -> None:
    """The unary call answers the same request with the same text, finish reason and usage."""
    token_ids = stage.encode("Hello there")
    stage.generator.script = says([*one_by_one(token_ids), ended(len(token_ids) + 1)])
    events = await stage.stream()
    answer = await stage.chat.CreateChatCompletion(stage.request())

    assert ["Hello there"] == [choice.content for choice in answer.choices]
    assert chat_pb2.FINISH_REASON_STOP == answer.choices[0].finish_reason
    assert events[-1].usage == answer.usage
    assert "tiny" == answer.header.model


async def test_only_unary_calls_request_the_whole_answer_at_once(stage: Stage) -> None:
    """A unary answer is read only at the end, but stop strings must be noticed as they come."""
    stage.generator.script = says([*one_by_one(stage.encode("Hello")), ended(2)])
    await stage.stream()
    await stage.chat.CreateChatCompletion(stage.request())
    await stage.chat.CreateChatCompletion(stage.request(stop=["STOP"]))

    assert [False, True, False] == [call.start.whole for call in stage.generator.calls]


async def test_the_generator_gets_the_prompt_and_the_sampling(stage: Stage) -> None:
    """What the caller omitted stays unset, and the revision is sent along."""
    stage.generator.script = says([ended(1)])
    await stage.stream(temperature=0.0, seed=-7, logit_bias={5: -1.5}, min_tokens=3)
    start = stage.generator.calls[0].start

    assert stage.model.revision == start.revision
    rendered = await stage.tokenizer.RenderChat(
        tokenizer_pb2.RenderChatRequest(model="tiny", messages=[user("Hello")])
    )
    assert list(rendered.token_ids) == list(start.prompt_token_ids)
    assert start.sampling.HasField("temperature")
    assert (0.0, -7, {5: -1.5}) == (
        start.sampling.temperature,
        start.sampling.seed,
        dict(start.sampling.logit_bias),
    )
    assert not start.sampling.HasField("top_p")
    assert (1, 3) == (start.n, start.min_new_tokens)
    assert not start.HasField("top_logprobs")
    assert CONTEXT_LENGTH - len(start.prompt_token_ids) == start.max_new_tokens


async def test_sampling_is_passed_through_unchanged(stage: Stage) -> None:
    """Every sampling field is passed through unchanged, even one for newer generators only."""
    stage.generator.script = says([ended(1)])
    given: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.0}
    given |= {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1e-9}
    given |= {"seed": 2**63 - 1, "logit_bias": {1: 2.5, 3: -100.0}, "allowed_token_ids": [3, 1]}
    request = stage.request(**given)
    field_100_is_1 = b"\xa0\x06\x01"
    request.options.sampling.MergeFromString(field_100_is_1)
    await stage.chat.CreateChatCompletion(request)
    sampling = stage.generator.calls[0].start.sampling

    assert request.options.sampling == sampling
    assert sampling.SerializeToString().endswith(field_100_is_1)


async def test_the_generators_refusal_has_the_public_fields_name(stage: Stage) -> None:
    """The generator's sampling.allowed_token_ids is the caller's allowed_token_ids."""
    fault = ServiceError(
        "invalid_parameter_combination", "no token is left", "sampling.allowed_token_ids"
    )
    stage.generator.script = fails_after([], fault)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.stream(allowed_token_ids=[2], min_tokens=1)

    assert ("invalid_parameter_combination", "allowed_token_ids") == code_of(refused.value)


async def test_max_tokens_is_capped_by_the_context(stage: Stage) -> None:
    """A limit beyond the context is not an error."""
    stage.generator.script = says([ended(1)])
    await stage.stream(max_completion_tokens=7)
    await stage.stream(max_completion_tokens=100_000)
    short, long = (call.start for call in stage.generator.calls)

    assert 7 == short.max_new_tokens
    assert CONTEXT_LENGTH - len(long.prompt_token_ids) == long.max_new_tokens


async def test_default_max_tokens(model: Model, model_folder: Path) -> None:
    """The default is the operator's, if the context has room; plain completions have OpenAI's."""
    async with running(model, model_folder, default_max_tokens=20) as stage:
        stage.generator.script = says([ended(1)])
        await stage.stream()
        await stage.stream(max_completion_tokens=50)
        await stage.stream(min_tokens=30)
        long_prompt = [user("Hello " * 25)]
        while CONTEXT_LENGTH - 20 > len(stage.generator.calls[-1].start.prompt_token_ids):
            await stage.stream(messages=long_prompt)
            long_prompt.append(user("Hi"))
        prompt = completion_pb2.Prompt(text="Hello")
        await stage.completions.CreateCompletion(
            completion_pb2.CreateCompletionRequest(model="tiny", prompts=[prompt])
        )
    first, asked, least, *_, full, plain = (call.start for call in stage.generator.calls)
    left = CONTEXT_LENGTH - len(full.prompt_token_ids)

    assert (20, 50, 30, 16) == tuple(s.max_new_tokens for s in (first, asked, least, plain))
    assert left == full.max_new_tokens < 20


async def test_length_is_reported(stage: Stage) -> None:
    """A choice that was cut off has the reason `length`, and keeps its last token."""
    token_ids = stage.encode("Hello there")
    last = message_of(update(0, token_ids), finish(0, LENGTH, len(token_ids)))
    stage.generator.script = says([last])
    events = await stage.stream()

    assert "Hello there" == text(events)
    assert chat_pb2.FINISH_REASON_LENGTH == deltas(events)[-1].finish_reason


async def test_tokens_of_one_message_are_one_delta(stage: Stage) -> None:
    """Tokens that the generator merged are one delta."""
    token_ids = stage.encode("one two three")
    stage.generator.script = says([message_of(update(0, token_ids)), ended(len(token_ids) + 1)])

    assert ["one two three", ""] == [delta.content for delta in deltas(await stage.stream())]


async def test_a_stop_string_ends_the_choice_at_once(stage: Stage) -> None:
    """The generator is told to stop, later tokens are dropped, and its device time is exact."""
    token_ids = stage.encode("one two END three")
    stage.generator.script = says_until_stopped(one_by_one(token_ids))
    events = await stage.stream(stop=["never", "END"])
    last = deltas(events)[-1]
    completed = len(stage.encode("one two END"))

    assert "one two " == text(events)
    assert ("END", chat_pb2.FINISH_REASON_STOP) == (last.matched_stop, last.finish_reason)
    assert (completed, completed) == (last.completion_tokens, events[-1].usage.completion_tokens)
    assert [0] == stage.generator.calls[0].stops
    assert 1_000 == events[-1].usage.device_nanoseconds


async def test_a_stop_string_in_the_last_message_sends_no_stop(stage: Stage) -> None:
    """The generator has already finished, so it is not told to stop."""
    token_ids = stage.encode("one END")
    last = message_of(update(0, token_ids), finish(0, LENGTH, len(token_ids)))
    stage.generator.script = says([last])
    events = await stage.stream(stop=["END"])

    assert ("one ", "END") == (text(events), deltas(events)[-1].matched_stop)
    assert chat_pb2.FINISH_REASON_STOP == deltas(events)[-1].finish_reason
    assert [] == stage.generator.calls[0].stops


async def test_text_held_back_comes_at_the_end(stage: Stage) -> None:
    """Text that might have become a stop string but did not is part of the last delta."""
    token_ids = stage.encode("one EN")
    stage.generator.script = says([*one_by_one(token_ids), ended(len(token_ids) + 1)])
    found = deltas(await stage.stream(stop=["END"]))

    assert "one EN" == "".join(delta.content for delta in found)
    assert "EN" == found[-1].content[-2:]
    assert found[-1].finish_reason


async def test_min_tokens_delays_stop_strings(stage: Stage) -> None:
    """A match within the first `min_tokens` tokens is text; a later one ends the choice."""
    token_ids = stage.encode("ENDa bcd END")
    stage.generator.script = says_until_stopped(one_by_one(token_ids))
    events = await stage.stream(stop=["END"], min_tokens=len(stage.encode("ENDa")))

    assert "ENDa bcd " == text(events)


async def test_choices_interleave_and_finish_independently(stage: Stage) -> None:
    """Each choice has its own text, stop string and end; usage counts the prompt once."""
    first, second = stage.encode("a STOP b"), stage.encode("other text")
    messages = [message_of(update(0, first[:1]), update(1, second[:1]))]
    messages += [message_of(update(0, first[1:]), update(1, second[1:]))]
    messages += [ended(len(second) + 1, index=1, nanoseconds=30, cached=9)]
    stage.generator.script = says_until_stopped(messages, cached=4, nanoseconds=12, choices=1)
    events = await stage.stream(n=2, stop=["STOP"])
    usage = events[-1].usage

    assert ("a ", "other text") == (text(events, 0), text(events, 1))
    assert ["STOP", ""] == [deltas(events, index)[-1].matched_stop for index in (0, 1)]
    assert len(stage.encode("a STOP")) + len(second) + 1 == usage.completion_tokens
    assert (42, 4) == (usage.device_nanoseconds, usage.cached_prompt_tokens)
    assert [0] == stage.generator.calls[0].stops


async def test_ignored_eos_has_no_text(stage: Stage) -> None:
    """The choice continues after an EOS token."""
    token_ids = [*stage.encode("one"), IM_END, *stage.encode(" two")]
    last = message_of(finish(0, LENGTH, len(token_ids)))
    stage.generator.script = says([*one_by_one(token_ids), last])
    events = await stage.stream(ignore_eos=True)

    assert "one two" == text(events)
    assert stage.generator.calls[0].start.ignore_eos


def scored(token_ids: Sequence[int]) -> list[generator_pb2.GenerateResponse]:
    """One message per token, with the token itself and the letter "a" as its top_logprobs."""
    return [
        message_of(
            update(
                0,
                [token_id],
                [
                    generator_pb2.TokenLogprobs(
                        logprob=-position, top_token_ids=[token_id, 67], top_logprobs=[-1.0, -2.0]
                    )
                ],
            )
        )
        for position, token_id in enumerate(token_ids)
    ]


async def test_logprobs_come_with_the_text_they_complete(stage: Stage) -> None:
    """Every token has an entry with its exact bytes; the stop token has none."""
    token_ids = stage.encode("a \U0001fae0!")
    stage.generator.script = says([*scored(token_ids), ended(len(token_ids) + 1)])
    found = deltas(await stage.stream(logprobs=True, top_logprobs=2))
    entries = [entry for delta in found for entry in delta.logprobs]
    melting = next(delta for delta in found if "\U0001fae0" in delta.content)

    assert 2 == stage.generator.calls[0].start.top_logprobs
    assert "a \U0001fae0!".encode() == b"".join(entry.bytes for entry in entries)
    assert [-float(i) for i in range(len(token_ids))] == [entry.logprob for entry in entries]
    assert len(melting.logprobs) > 1
    assert "\ufffd" in melting.logprobs[-1].token
    assert [-1.0, -2.0] == [top.logprob for top in entries[0].top_logprobs]
    assert "a" == entries[0].top_logprobs[0].token


async def test_logprobs_end_where_a_stop_string_begins(stage: Stage) -> None:
    """Tokens that contribute text are reported, those cut off entirely are not."""
    token_ids = stage.encode("one xSTOP")
    stage.generator.script = says_until_stopped(scored(token_ids))
    answer = await stage.chat.CreateChatCompletion(stage.request(logprobs=True, stop=["STOP"]))
    entries = answer.choices[0].logprobs
    kept = len(stage.encode("one x"))

    assert "one x" == answer.choices[0].content
    assert kept <= len(entries) < len(token_ids)
    assert b"".join(entry.bytes for entry in entries).startswith(b"one x")


async def test_logprobs_without_alternatives(stage: Stage) -> None:
    """`logprobs` without `top_logprobs` still requests those of the tokens themselves."""
    stage.generator.script = says([ended(1)])
    await stage.stream(logprobs=True)

    assert stage.generator.calls[0].start.HasField("top_logprobs")
    assert 0 == stage.generator.calls[0].start.top_logprobs


async def test_a_prompt_as_long_as_the_context_is_refused(stage: Stage) -> None:
    """The message has the phrase that client libraries look for; the generator is not called."""
    for content in ("word " * CONTEXT_LENGTH, "word " * 1_000_000):
        with pytest.raises(grpc.aio.AioRpcError, match=str(CONTEXT_LENGTH)) as refused:
            await stage.stream(messages=[user(content)])

        assert grpc.StatusCode.OUT_OF_RANGE is refused.value.code()
        assert ("context_length_exceeded", "messages") == code_of(refused.value)
        assert f"maximum context length is {CONTEXT_LENGTH} tokens" in refused.value.details()
    assert [] == stage.generator.calls


async def test_the_generators_context_length_applies(stage: Stage) -> None:
    """The generator's slots may be shorter than the model's context."""
    stage.generator.context_length = 200
    await stage.stop_generator()
    await stage.start_generator()
    await available(stage)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.stream(messages=[user("word " * 200)])

    assert "maximum context length is 200 tokens" in (refused.value.details() or "")


async def available(stage: Stage) -> None:
    """Waits until the stage has found the restarted generator."""
    stage.generator.script = says([ended(1)])
    for _ in range(500):
        try:
            model = await stage.models.GetModel(model_pb2.GetModelRequest(id="tiny"))
            if model.model.context_length == min(stage.generator.context_length, CONTEXT_LENGTH):
                await stage.stream()
                stage.generator.calls.clear()
                return
        except grpc.aio.AioRpcError:
            pass
        await asyncio.sleep(0.02)
    raise AssertionError("the generator was not found again")


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_disconnected_caller_cancels_its_generation(stage: Stage, streaming: bool) -> None:
    """The generator's call is cancelled, for unary calls and for streams."""
    stage.generator.script = stalls_after(one_by_one(stage.encode("one")))
    if streaming:
        call = stage.chat.StreamChatCompletion(stage.request())
        await call.read()
    else:
        call = stage.chat.CreateChatCompletion(stage.request())
        await stage.generator.called.wait()
    call.cancel()

    await stage.generator.calls[0].cancelled.wait()


async def test_a_caller_that_disconnects_before_the_first_token(stage: Stage) -> None:
    """Queued requests are cancelled too."""
    stage.generator.script = stalls_after([])
    call = stage.chat.StreamChatCompletion(stage.request())
    await stage.generator.called.wait()
    call.cancel()

    await stage.generator.calls[0].cancelled.wait()


async def test_the_deadline_is_passed_on_and_enforced(stage: Stage) -> None:
    """The generator is given the remaining time, and its call is cancelled when that is over."""
    stage.generator.script = stalls_after([])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.chat.CreateChatCompletion(stage.request(), timeout=0.5)
    await stage.generator.calls[0].cancelled.wait()

    assert grpc.StatusCode.DEADLINE_EXCEEDED is refused.value.code()
    assert 0 < (stage.generator.calls[0].seconds_left or 0) <= 0.5


async def test_the_request_id_is_passed_on(stage: Stage) -> None:
    """The request id and the trace parent reach the generator."""
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    stage.generator.script = says([ended(1)])
    metadata = (("x-request-id", "req-7"), ("traceparent", parent))
    await stage.chat.CreateChatCompletion(stage.request(), metadata=metadata)
    seen = stage.generator.calls[0].metadata

    assert ("req-7", parent) == (seen["x-request-id"], seen["traceparent"])


@pytest.mark.parametrize(
    "parent",
    [
        f"00-{'0' * 32}-{'b' * 16}-01",
        f"00-{'a' * 32}-{'0' * 16}-01",
        f"ff-{'a' * 32}-{'b' * 16}-01",
        f"00-{'A' * 32}-{'b' * 16}-01",
    ],
)
async def test_an_invalid_traceparent_is_ignored(stage: Stage, parent: str) -> None:
    """As W3C demands: all requests of a client that sends zeros are not one trace."""
    stage.generator.script = says([ended(1)])
    await stage.chat.CreateChatCompletion(stage.request(), metadata=(("traceparent", parent),))

    assert "traceparent" not in stage.generator.calls[0].metadata


async def test_the_generators_refusal_is_passed_on(stage: Stage) -> None:
    """The caller gets the generator's code and retry time."""
    stage.generator.script = fails_after([], ServiceError("queue_full", "full", retry_after=7))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.stream()

    assert grpc.StatusCode.RESOURCE_EXHAUSTED is refused.value.code()
    assert ("queue_full", None) == code_of(refused.value)
    assert 7 == from_rpc_error(refused.value).retry_after


async def test_an_error_mid_stream_ends_the_stream(stage: Stage) -> None:
    """The caller keeps the text sent so far; the error's details are not revealed."""
    fault = RuntimeError("secret")
    stage.generator.script = fails_after(one_by_one(stage.encode("one")), fault)
    call = stage.chat.StreamChatCompletion(stage.request())
    events = []
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for event in call:
            events.append(event)

    assert "one" == text(events)
    assert ("internal_error", None) == code_of(refused.value)
    assert "secret" not in (refused.value.details() or "")


async def test_a_generator_that_ends_early_is_an_error(stage: Stage) -> None:
    """A truncated answer is never mistaken for a complete one."""
    stage.generator.script = says(one_by_one(stage.encode("one")))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.chat.CreateChatCompletion(stage.request())

    assert ("internal_error", None) == code_of(refused.value)


async def test_metrics_add_up(stage: Stage) -> None:
    """Requests, tokens and latencies are counted, and none is left in flight."""
    token_ids = stage.encode("one two three")
    stage.generator.script = says([*one_by_one(token_ids), ended(len(token_ids) + 1)])
    await stage.stream()
    with pytest.raises(grpc.aio.AioRpcError):
        await stage.stream(temperature=3.0)
    names = {"model_name": "tiny"}
    value = stage.metrics.registry.get_sample_value

    assert 1 == value("trivium_requests_total", {"code": "ok"})
    assert 1 == value("trivium_requests_total", {"code": "decimal_above_max_value"})
    assert 0 == value("trivium_requests_in_flight")
    assert len(token_ids) + 1 == value("vllm:generation_tokens_total", names)
    assert len(token_ids) == value("vllm:inter_token_latency_seconds_count", names)
    assert 1 == value("vllm:time_to_first_token_seconds_count", names)
    assert 1 == value("vllm:e2e_request_latency_seconds_count", names)
    assert 0 < value("vllm:time_to_first_token_seconds_sum", names)
    assert value("vllm:time_to_first_token_seconds_sum", names) <= value(
        "vllm:e2e_request_latency_seconds_sum", names
    )
    assert value("vllm:e2e_request_latency_seconds_sum", names) < 60
    assert 1 == value("vllm:request_success_total", names | {"finished_reason": "stop"})
    prompt_tokens = len(stage.generator.calls[0].start.prompt_token_ids)
    assert prompt_tokens == value("vllm:prompt_tokens_total", names)
    assert prompt_tokens == value("vllm:request_prompt_tokens_sum", names)
    assert len(token_ids) + 1 == value("vllm:request_generation_tokens_sum", names)
    assert 1 == value("vllm:request_generation_tokens_count", names)

    replica = names | {"replica": f"127.0.0.1:{stage.generator_port}"}

    assert value("trivium_replica_picked_total", replica) >= 1
    assert 0 == value("trivium_replica_outstanding", replica)
    assert 1 == value("trivium_replica_state", replica | {"state": "serving"})


async def test_each_request_counts_once_with_vllms_finish_reasons(stage: Stage) -> None:
    """A request with two choices counts once, as `length` if one of them was cut off; a
    disconnected caller counts as `abort`, a failure as `error`; prompt and generation lengths cover
    all of them."""
    names = {"model_name": "tiny"}
    value = stage.metrics.registry.get_sample_value

    def reasons() -> dict[str, float | None]:
        return {
            reason: value("vllm:request_success_total", names | {"finished_reason": reason})
            for reason in ("stop", "length", "abort", "error")
        }

    assert dict.fromkeys(reasons(), 0) == reasons()
    token_ids = stage.encode("one two")
    cut = message_of(update(1, token_ids), finish(1, LENGTH, len(token_ids)))
    stage.generator.script = says([*one_by_one(token_ids), ended(len(token_ids) + 1), cut])
    await stage.stream(n=2)
    stage.generator.script = fails_after(one_by_one(token_ids), RuntimeError("fault"))
    with pytest.raises(grpc.aio.AioRpcError):
        await stage.stream()
    stage.generator.script = stalls_after(one_by_one(token_ids))
    call = stage.chat.StreamChatCompletion(stage.request())
    await call.read()
    call.cancel()
    await stage.generator.calls[-1].cancelled.wait()
    async with asyncio.timeout(30):
        while value("trivium_requests_in_flight"):
            await stage.models.ListModels(model_pb2.ListModelsRequest())

    assert {"stop": 0, "length": 1, "abort": 1, "error": 1} == reasons()
    assert 1 == value("vllm:e2e_request_latency_seconds_count", names)
    for kind in ("prompt", "generation"):
        assert 3 == value(f"vllm:request_{kind}_tokens_count", names)
        assert value(f"vllm:{kind}_tokens_total", names) == value(
            f"vllm:request_{kind}_tokens_sum", names
        )


async def test_usage_and_finish_reasons_are_reported_to_the_generator(stage: Stage) -> None:
    """It reports the caller's usage and each finish reason once, before the call ends."""
    token_ids = stage.encode("Hello")

    async def script(start: Any, stops: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:
        yield message_of(*(update(index, token_ids) for index in range(3)))
        yield message_of(
            *(finish(index, reason, 9) for index, reason in enumerate([LENGTH, STOP_TOKEN, LENGTH]))
        )
        await stage.generator.calls[-1].reported.wait()

    stage.generator.script = script
    events = await stage.stream(n=3)
    report = stage.generator.calls[0].report

    assert stage.generator.calls[0].start.sends_report
    assert report is not None
    assert events[-1].usage.completion_tokens == report.completion_tokens == 27
    assert (0, ["length", "stop"]) == (report.reasoning_tokens, list(report.finish_reasons))
