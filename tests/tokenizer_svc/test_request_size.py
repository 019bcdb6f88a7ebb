"""Requests over gRPC that are too large, and large ones that are not."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.completion_requests import options
from tests.event_loop import stall
from tests.tokenizer_svc.conftest import Stage, user, write_model
from tests.tokenizer_svc.scripted_generator import code_of, finish, message_of, says, update
from tokenizer_svc.models import load_model
from trivium.chat.v1 import chat_pb2, completion_pb2
from trivium.generator.v1 import generator_pb2
from trivium.tokenizer.v1 import tokenizer_pb2

ANSWER = [message_of(update(0, [2]), finish(0, generator_pb2.FINISH_REASON_STOP_TOKEN, 1))]
PART = chat_pb2.ContentPart(text="a")
CALL = chat_pb2.ToolCall(id="a", name="f", arguments="{}")
NUMBERS = "[" + "1," * 600_000 + "1]"


def said(parts: int) -> chat_pb2.ChatMessage:
    return chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=[PART] * parts)


def called(calls: int, arguments: str = "{}") -> chat_pb2.ChatMessage:
    call = chat_pb2.ToolCall(id="a", name="f", arguments=arguments)
    return chat_pb2.ChatMessage(role=chat_pb2.ROLE_ASSISTANT, tool_calls=[call] * calls)


def tool(number: int = 0, **fields: str) -> chat_pb2.Tool:
    return chat_pb2.Tool(function=chat_pb2.FunctionTool(name=f"f{number}", **fields))


def choices(count: int) -> chat_pb2.StructuredOutputs:
    return chat_pb2.StructuredOutputs(choice=chat_pb2.ChoiceList(choices=["a"] * count))


async def refusal(call: Any) -> tuple[str, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return code_of(refused.value)


ARGUMENTS = "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": [user("a")] * 2_049}, "array_above_max_length", "messages"),
        ({"messages": [said(8_192), said(1)]}, "array_above_max_length", "messages[1].content"),
        (
            {"messages": [called(4_096), called(1)]},
            "array_above_max_length",
            "messages[1].tool_calls",
        ),
        ({"tools": [tool(n) for n in range(129)]}, "array_above_max_length", "tools"),
        ({"stop": ["a"] * 100_000}, "array_above_max_length", "stop"),
        ({"stop_token_ids": [1] * 100_000}, "array_above_max_length", "stop_token_ids"),
        ({"allowed_token_ids": [1] * 100_000}, "array_above_max_length", "allowed_token_ids"),
        ({"bad_words": ["a"] * 100_000}, "array_above_max_length", "bad_words"),
        (
            {"structured_outputs": choices(100_000)},
            "array_above_max_length",
            "structured_outputs.choice",
        ),
        ({"logit_bias": dict.fromkeys(range(16_385), 1.0)}, "invalid_value", "logit_bias"),
        (
            {"chat_template_kwargs": {f"v{n}": "1" for n in range(65)}},
            "invalid_value",
            "chat_template_kwargs",
        ),
        ({"messages": [called(1, '{"a":' + NUMBERS + "}")]}, "invalid_value", ARGUMENTS),
        ({"messages": [called(1, "[" * 40_000)]}, "invalid_value", ARGUMENTS),
        (
            {"chat_template_kwargs": {"thinking": NUMBERS}},
            "invalid_value",
            "chat_template_kwargs.thinking",
        ),
        (
            {"tools": [tool(n, parameters='{"a":[' + "{}," * 9_000 + "{}]}") for n in range(4)]},
            "invalid_value",
            "tools[3].function.parameters",
        ),
    ],
)
async def test_requests_over_a_limit_name_the_field(
    stage: Stage, fields: dict[str, Any], code: str, param: str
) -> None:
    """The error names the field that exceeds the limit, and no generator is called."""
    assert (code, param) == await refusal(stage.chat.CreateChatCompletion(stage.request(**fields)))
    assert [] == stage.generator.calls


async def test_requests_at_the_limit_are_accepted(stage: Stage) -> None:
    """2,048 messages, or 8,192 parts, are allowed; these are only too long for the model."""
    messages = [said(4) for _ in range(2_048)]
    code, param = await refusal(stage.chat.CreateChatCompletion(stage.request(messages=messages)))

    assert ("context_length_exceeded", "messages") == (code, param)


async def test_other_methods_have_the_same_limits(stage: Stage) -> None:
    """Calls for plain completions and for tokens have the same limits."""
    ids = completion_pb2.TokenIds(ids=[1] * 524_289)
    completion = completion_pb2.CreateCompletionRequest(
        model=stage.model.id, prompts=[completion_pb2.Prompt(token_ids=ids)]
    )
    rendered = tokenizer_pb2.RenderChatRequest(model=stage.model.id, messages=[user("a")] * 2_049)
    tokens = tokenizer_pb2.DetokenizeRequest(model=stage.model.id, token_ids=[1] * 524_289)
    too_long = "array_above_max_length"

    assert (too_long, "prompt") == await refusal(stage.completions.CreateCompletion(completion))
    assert (too_long, "messages") == await refusal(stage.tokenizer.RenderChat(rendered))
    assert (too_long, "token_ids") == await refusal(stage.tokenizer.Detokenize(tokens))


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is a few million tokens long."""
    folder = tmp_path_factory.mktemp("models") / "long"
    return write_model(folder, context_length=3_000_000)


@pytest.fixture
async def long_stage(long_folder: Path) -> AsyncIterator[Stage]:
    stage = Stage(load_model(long_folder), long_folder)
    await stage.start()
    yield stage
    await stage.close()


@pytest.mark.parametrize("where", ["text", "tool", "reasoning and calls", "control tokens"])
async def test_a_long_conversation_does_not_block_the_event_loop(
    long_stage: Stage, where: str
) -> None:
    """Rendering and encoding do not block the event loop, wherever the text is."""
    text = "lorem ipsum " * 150_000
    fields: dict[str, Any] = {
        "text": {"messages": [user(text)]},
        "tool": {"tools": [tool(description=text)]},
        "reasoning and calls": {
            "messages": [
                user("a"),
                chat_pb2.ChatMessage(
                    role=chat_pb2.ROLE_ASSISTANT, reasoning_content=text, tool_calls=[CALL]
                ),
                chat_pb2.ChatMessage(
                    role=chat_pb2.ROLE_ASSISTANT,
                    tool_calls=[chat_pb2.ToolCall(id="a", name="f", arguments=text)],
                ),
            ]
        },
        "control tokens": {"messages": [user("<|" * 100_000 + "<|im_end|>" * 100_000)]},
    }[where]
    long_stage.generator.script = says(ANSWER)

    assert await stall(long_stage.chat.CreateChatCompletion(long_stage.request(**fields))) < 0.5


def echo(stage: Stage, tokens: int, n: int = 1) -> completion_pb2.CreateCompletionRequest:
    ids = completion_pb2.TokenIds(ids=[70] * tokens)
    prompts = [completion_pb2.Prompt(token_ids=ids)]
    return completion_pb2.CreateCompletionRequest(
        model=stage.model.id, prompts=prompts, echo=True, logprobs=3, options=options(n=n)
    )


@pytest.mark.parametrize("whole", [True, False])
async def test_a_long_echo_does_not_block_the_event_loop(long_stage: Stage, whole: bool) -> None:
    """Converting its log-probabilities does not block the event loop."""
    answer = message_of(update(0, [2]), finish(0, generator_pb2.FINISH_REASON_STOP_TOKEN, 1))
    score = generator_pb2.TokenLogprobs(
        logprob=-1.0, top_token_ids=[71, 72, 73], top_logprobs=[-1.0, -2.0, -3.0]
    )
    answer.prompt_logprobs.extend([score] * 119_999)
    long_stage.generator.script = says([answer])
    asked = echo(long_stage, 120_000)

    async def streamed() -> None:
        async for _ in long_stage.completions.StreamCompletion(asked):
            pass

    if whole:
        assert await stall(long_stage.completions.CreateCompletion(asked)) < 0.4
    else:
        assert await stall(streamed()) < 0.4


async def test_the_logprobs_of_an_echo_are_limited(long_stage: Stage) -> None:
    """The limit is over all choices; a short request could otherwise get gigabytes."""
    long_stage.generator.script = says(ANSWER)
    for asked in (echo(long_stage, 131_073), echo(long_stage, 1_025, n=128)):
        call = long_stage.completions.CreateCompletion(asked)
        assert ("invalid_value", "logprobs") == await refusal(call)
        asked.ClearField("logprobs")
        asked.options.n = 1
        await long_stage.completions.CreateCompletion(asked)


async def test_prompt_logprobs_are_limited(long_stage: Stage) -> None:
    """Each choice of a plain completion has them, a chat once for all of its choices."""
    long_stage.generator.script = says(ANSWER)
    asked = echo(long_stage, 1_025, n=128)
    asked.ClearField("logprobs")
    asked.options.prompt_logprobs = 3
    text = [user("a" * 130_000)]
    chat = long_stage.request(messages=text, prompt_logprobs=4, n=2)
    shown = tokenizer_pb2.RenderChatRequest(model=long_stage.model.id, messages=text)
    tokens = len((await long_stage.tokenizer.RenderChat(shown)).token_ids)
    for call, count in (
        (long_stage.completions.CreateCompletion(asked), 4 * 1_025 * 128),
        (long_stage.chat.CreateChatCompletion(chat), 5 * tokens),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=f"would have {count}") as refused:
            await call
        assert ("invalid_value", "prompt_logprobs") == code_of(refused.value)


async def test_a_far_too_long_prompt_is_not_encoded_in_full(stage: Stage) -> None:
    """Only its beginning is encoded; its exact length is not reported."""
    with pytest.raises(grpc.aio.AioRpcError, match="resulted in more than 256 tokens"):
        await stage.stream(messages=[user("ä" * 2_100)])
