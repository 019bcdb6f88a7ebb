"""Answers through all three services, on a tiny model with random weights."""

import concurrent.futures
import json
from collections import defaultdict
from typing import Any

import grpc
import httpx
import openai
import pytest

from tests.completion_requests import chat_request
from tests.pipeline.services import Services
from trivium.chat.v1 import chat_pb2, chat_pb2_grpc

MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time in a village"}]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 40}


def ask(client: openai.OpenAI, services: Services, **fields: Any) -> Any:
    fields = {"messages": MESSAGES, "model": services.model, **SAMPLED, **fields}
    return client.chat.completions.create(**fields)


def test_streaming_and_unary_answers_are_equal(client: openai.OpenAI, services: Services) -> None:
    """A stream's deltas joined are the unary answer's text, with the same usage."""
    whole = ask(client, services)
    pieces = list(ask(client, services, stream=True, stream_options={"include_usage": True}))

    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == pieces[-2].choices[0].finish_reason
    for usage in (whole.usage, pieces[-1].usage):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.completion_tokens == whole.usage.completion_tokens
        assert usage.gpu_seconds > 0


def test_grpc_and_rest_give_the_same_answer(client: openai.OpenAI, services: Services) -> None:
    """A gRPC caller gets the same text and counts as a REST caller."""
    answer = ask(client, services, n=3)
    request = chat_request(
        model=services.model,
        messages=[
            chat_pb2.ChatMessage(
                role=chat_pb2.ROLE_USER,
                content=[chat_pb2.ContentPart(text=MESSAGES[0]["content"])],
            )
        ],
        temperature=1.0,
        seed=7,
        max_completion_tokens=40,
        n=3,
    )
    with grpc.insecure_channel(services.chat_target) as channel:
        reply = chat_pb2_grpc.ChatServiceStub(channel).CreateChatCompletion(request)

    assert [c.message.content for c in answer.choices] == [c.content for c in reply.choices]
    assert answer.usage.completion_tokens == reply.usage.completion_tokens
    assert answer.usage.prompt_tokens == reply.usage.prompt_tokens


def test_a_seed_gives_the_same_tokens_under_any_load(
    client: openai.OpenAI, services: Services
) -> None:
    """Alone or among twenty other requests, with n or without, cached or not, they are the same."""
    alone = ask(client, services, n=2)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        others = [
            pool.submit(
                ask,
                client,
                services,
                messages=[{"role": "user", "content": f"{number} stories " * (number % 7 + 1)}],
                seed=number,
            )
            for number in range(20)
        ]
        crowded = [pool.submit(ask, client, services, n=2) for _ in range(3)]
        for other in others:
            other.result()

    for answer in crowded:
        assert [c.message.content for c in alone.choices] == [
            c.message.content for c in answer.result().choices
        ]


def test_choices_interleave_and_finish_independently(
    client: openai.OpenAI, services: Services
) -> None:
    """Deltas carry their index; each index has one role chunk, its text, and one finish chunk."""
    events: dict[int, list[Any]] = defaultdict(list)
    order = []
    for chunk in ask(client, services, n=4, stream=True):
        for choice in chunk.choices:
            events[choice.index].append(choice)
            order.append(choice.index)

    assert {0, 1, 2, 3} == set(events)
    assert order != sorted(order)
    for choices in events.values():
        assert ("assistant", "") == (choices[0].delta.role, choices[0].delta.content)
        assert all(choice.finish_reason is None for choice in choices[:-1])
        assert choices[-1].finish_reason in ("stop", "length")
        assert not choices[-1].delta.content
    texts = {"".join(c.delta.content or "" for c in choices) for choices in events.values()}
    assert len(texts) > 1


def test_choices_share_one_prompt(client: openai.OpenAI, services: Services) -> None:
    """Four choices count one prompt, in the usage and in the generator's metrics."""
    before = services.generator_metrics()["trivium_engine_prompt_tokens_total"]
    messages = [{"role": "user", "content": "A prompt that nobody else sends " * 20}]
    four = ask(client, services, messages=messages, n=4)
    counted = services.generator_metrics()["trivium_engine_prompt_tokens_total"] - before
    one = ask(client, services, messages=messages)

    assert one.usage.prompt_tokens == four.usage.prompt_tokens == counted
    assert four.usage.completion_tokens > one.usage.completion_tokens


def test_stop_strings_end_the_text_exactly(client: openai.OpenAI, services: Services) -> None:
    """Wherever the stop string is, the text ends right before it, streaming or not."""
    text = ask(client, services).choices[0].message.content
    assert len(text) > 12
    for start in range(1, len(text) - 4, 3):
        stop = text[start : start + 4]
        wanted = text[: text.index(stop)]
        whole = ask(client, services, stop=["\0 never", stop])
        streamed = ask(client, services, stop=stop, stream=True)

        assert wanted == whole.choices[0].message.content
        assert "stop" == whole.choices[0].finish_reason
        assert wanted == "".join(chunk.choices[0].delta.content or "" for chunk in streamed)


def test_a_stop_string_ends_only_its_choice(client: openai.OpenAI, services: Services) -> None:
    """A match in one of n choices does not affect the others."""
    free = ask(client, services, n=3)
    texts = [choice.message.content for choice in free.choices]
    stop = texts[1][5:11]
    cut = ask(client, services, n=3, stop=stop)

    for text, choice in zip(texts, cut.choices, strict=True):
        assert text.split(stop)[0] == choice.message.content
    assert cut.usage.completion_tokens < free.usage.completion_tokens


def test_logprobs_match_the_text(client: openai.OpenAI, services: Services) -> None:
    """The tokens' bytes are the text's, and greedy tokens are first in their top_logprobs."""
    answer = ask(client, services, temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content

    joined = b"".join(bytes(token.bytes) for token in content)
    assert answer.choices[0].message.content.encode() == joined.decode("utf-8", "replace").encode()
    for token in content:
        assert 3 == len(token.top_logprobs)
        assert (
            token.logprob
            == token.top_logprobs[0].logprob
            == max(top.logprob for top in token.top_logprobs)
        )


def test_a_second_turn_reuses_the_cached_prefix(client: openai.OpenAI, services: Services) -> None:
    """cached_tokens says how much was reused, and reuse does not change the answer."""
    first: list[Any] = [{"role": "user", "content": "Tell me of kings and thieves " * 8}]
    answer = ask(client, services, messages=first)
    second = [
        *first,
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    warm = ask(client, services, messages=second)
    again = ask(client, services, messages=second)

    assert warm.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens - 5
    assert again.usage.prompt_tokens_details.cached_tokens > (
        warm.usage.prompt_tokens_details.cached_tokens
    )
    assert warm.choices[0].message.content == again.choices[0].message.content


def test_token_limits_are_exact(client: openai.OpenAI, services: Services) -> None:
    """max_tokens and min_tokens are exact; ignore_eos generates up to the limit."""
    exact = ask(client, services, max_tokens=5, extra_body={"ignore_eos": True})
    long = ask(client, services, max_tokens=60, extra_body={"min_tokens": 60})

    assert (5, "length") == (exact.usage.completion_tokens, exact.choices[0].finish_reason)
    assert 60 == long.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="this prompt leaves") as refusal:
        ask(client, services, max_tokens=2_047, extra_body={"min_tokens": 2_047})
    assert ("invalid_value", "min_tokens") == (refusal.value.code, refusal.value.param)


def test_a_prompt_over_the_context_is_refused(client: openai.OpenAI, services: Services) -> None:
    """It is a 400 with OpenAI's code, and the message has the limit."""
    messages = [{"role": "user", "content": "Once upon a time " * 2000}]
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, services, messages=messages)

    assert "context_length_exceeded" == refusal.value.code
    assert "maximum context length is 2048 tokens" in refusal.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_p": -0.1}, "top_p"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"max_completion_tokens": 3}, "max_tokens"),
    ],
)
def test_invalid_fields_are_named(services: Services, fields: dict[str, Any], param: str) -> None:
    """They are a 400 in OpenAI's error format that names the field."""
    body = {"model": services.model, "messages": MESSAGES, **SAMPLED, **fields}
    reply = httpx.post(f"{services.url}/v1/chat/completions", json=body)

    error = reply.json()["error"]
    assert (400, "invalid_request_error") == (reply.status_code, error["type"])
    assert error["param"].startswith(param) or "max_completion_tokens" == error["param"]


def test_text_in_any_script_has_whole_characters(client: openai.OpenAI, services: Services) -> None:
    """Whatever characters are sent, deltas have whole characters."""
    text = "🫠🥹龜 <|im_end|> ñ 👩‍👩‍👧 \u0301"
    for chunk in ask(client, services, messages=[{"role": "user", "content": text}], stream=True):
        json.dumps(chunk.choices[0].delta.content, ensure_ascii=False).encode("utf-8")


def test_models(client: openai.OpenAI, services: Services) -> None:
    """The model is listed with its context length; any other is 404."""
    models = client.models.list().data

    assert [services.model] == [model.id for model in models]
    assert 2048 == models[0].model_dump()["context_length"]
    with pytest.raises(openai.NotFoundError):
        ask(client, services, model="gpt-4o")
