"""OpenAI's official Python client, strictly validating everything it gets."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.rest_facade.scripted_backend import (
    MODEL,
    ScriptedBackend,
    call,
    delta,
    header,
    logprob,
    text_delta,
    text_logprob,
    usage,
)
from trivium.wire.errors import ServiceError


@pytest.fixture
async def official(client: httpx.AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    """The official client, strict and without retries."""
    async with AsyncOpenAI(
        base_url=f"{client.base_url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as strict:
        yield strict


async def test_official_client(official: AsyncOpenAI, backend: ScriptedBackend) -> None:
    """An answer with log-probabilities fits OpenAI's schema."""
    backend.script = (
        header(),
        delta("Hi", logprobs=[logprob("Hi")]),
        delta(finish="STOP"),
        usage(),
    )
    answer = await official.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=1,
    )
    choice = answer.choices[0]

    assert choice.message.content == "Hi"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].bytes == [72, 105]
    assert answer.usage is not None
    assert answer.usage.model_extra == {"gpu_seconds": 1.5}


async def test_official_client_streaming(official: AsyncOpenAI) -> None:
    """A stream with usage fits OpenAI's schema, chunk by chunk."""
    stream = await official.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    assert "Hello world" == "".join(
        chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 9


async def test_official_client_tools(official: AsyncOpenAI, backend: ScriptedBackend) -> None:
    """Calls and reasoning fit OpenAI's schema; the client joins a stream's pieces."""
    backend.script = (
        header(),
        delta(reasoning_content="Hm"),
        delta(tool_calls=[call("f", '{"a":')]),
        delta(tool_calls=[call(arguments="1}"), call("g", "{}", position=1)]),
        delta(finish="TOOL_CALLS"),
        usage(3, reasoning_tokens=1),
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}]
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    whole = await official.chat.completions.create(**asked)
    async with official.chat.completions.stream(**asked) as stream:
        joined = await stream.get_final_completion()

    for message in (whole.choices[0].message, joined.choices[0].message):
        assert message.content is None
        assert message.tool_calls is not None
        assert [("call_0", "f", '{"a":1}'), ("call_1", "g", "{}")] == [
            (made.id, made.function.name, made.function.arguments) for made in message.tool_calls
        ]
    assert whole.choices[0].message.reasoning_content == "Hm"
    assert whole.usage.completion_tokens_details.reasoning_tokens == 1


async def test_official_client_completions(official: AsyncOpenAI, backend: ScriptedBackend) -> None:
    """A plain completion with log-probabilities fits OpenAI's schema."""
    logprobs = [text_logprob(logprob("Hi"), 0)]
    backend.text_script = (
        header(),
        text_delta("Hi", logprobs=logprobs),
        text_delta(finish="STOP"),
        usage(),
    )
    answer = await official.completions.create(model=MODEL, prompt="Say", logprobs=1)
    choice = answer.choices[0]

    assert (choice.text, choice.finish_reason) == ("Hi", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs == [{"Hi": -0.5}]


async def test_official_client_models(official: AsyncOpenAI) -> None:
    """The list of models, and a single model, fit OpenAI's schema."""
    listed = [model.id async for model in official.models.list()]
    one = await official.models.retrieve(MODEL)

    assert listed == [MODEL, "org/other"]
    assert one.id == MODEL


async def test_official_client_errors(official: AsyncOpenAI, backend: ScriptedBackend) -> None:
    """Errors arrive as the client's own exceptions, before and during a stream."""
    backend.script = (ServiceError("context_length_exceeded", "Too long.", "messages"),)
    with pytest.raises(openai.BadRequestError) as refused:
        await official.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
        )
    backend.script = (header(), delta("He"), ServiceError("backend_unavailable", "It is gone."))
    stream = await official.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="It is gone") as broken:
        async for _ in stream:
            pass

    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert broken.value.code == "backend_unavailable"
