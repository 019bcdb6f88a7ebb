"""gpt-oss through all three services: a tiny one that was trained to write Harmony."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.pipeline.services import Services
from tests.tiny_gpt_oss import QUESTION, TOOL, TRAINING_EXAMPLES, WEATHER
from tests.tiny_models import tiny_model_directory

LOW, MEDIUM, HIGH, CALL = (answer for _, _, answer in TRAINING_EXAMPLES)
MODEL = "tiny-gpt-oss-taught-int8"
ANSWER = "The capital is Paris."


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tiny_model_directory("gpt-oss-taught", "int8")
    with Services(folder, tmp_path_factory.mktemp("gpt-oss")) as services:
        yield services


@pytest.fixture
def client(gpt_oss: Services) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gpt_oss.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def reasoning(message: Any) -> str | None:
    """Reasoning content, which the official client's types do not have."""
    extra: dict[str, Any] = message.model_extra
    return extra.get("reasoning_content")


def thought(answer: str) -> str:
    """The text in an answer's analysis channel."""
    return answer.split("analysis<|message|>")[1].split("<|end|>")[0]


@pytest.mark.parametrize(("effort", "output"), [("medium", MEDIUM), ("high", HIGH)])
def test_the_analysis_channel_becomes_reasoning_content(
    client: openai.OpenAI, effort: str, output: str
) -> None:
    """The analysis channel is reasoning_content; after its <|end|> the answer continues up to
    <|return|>. The model reads the reasoning effort in its prompt."""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, reasoning_effort=effort, temperature=0, max_tokens=100
    )
    choice = answer.choices[0]

    assert "stop" == choice.finish_reason
    assert ANSWER == choice.message.content
    assert thought(output) == reasoning(choice.message)


def test_low_effort_skips_the_reasoning(client: openai.OpenAI) -> None:
    """This model was trained not to reason at low effort."""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, reasoning_effort="low", temperature=0, max_tokens=100
    )
    choice = answer.choices[0]

    assert ("stop", ANSWER) == (choice.finish_reason, choice.message.content)
    assert not reasoning(choice.message)


def test_channels_are_streamed_separately(client: openai.OpenAI) -> None:
    """All of the reasoning comes first, then the answer, without markers in either."""
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=100, stream=True
    )
    parts: list[tuple[str, str]] = []
    for chunk in stream:
        for choice in chunk.choices:
            parts += [("reasoning", text) for text in [reasoning(choice.delta)] if text]
            parts += [("content", text) for text in [choice.delta.content] if text]
    kinds = [kind for kind, _ in parts]

    assert sorted(kinds, reverse=True) == kinds
    assert thought(MEDIUM) == "".join(text for kind, text in parts if kind == "reasoning")
    assert ANSWER == "".join(text for kind, text in parts if kind == "content")


def test_a_tool_call_in_the_commentary_channel(client: openai.OpenAI) -> None:
    """<|call|> ends the answer; its message is a tool call."""
    answer = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=[TOOL], temperature=0, max_tokens=100
    )
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls or ()

    assert "tool_calls" == choice.finish_reason
    assert "function" == call.type
    assert ("get_weather", '{"city": "Paris"}') == (call.function.name, call.function.arguments)
    assert thought(CALL) == reasoning(choice.message)
    assert not choice.message.content


def test_a_tool_call_can_be_forced(client: openai.OpenAI) -> None:
    """Even a model that would rather answer is constrained to a valid call."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[TOOL],
        tool_choice="required",
        temperature=0,
        max_tokens=200,
    )
    (call,) = answer.choices[0].message.tool_calls or ()

    assert "function" == call.type
    assert "get_weather" == call.function.name


def test_usage_counts_all_messages_and_markers(client: openai.OpenAI, gpt_oss: Services) -> None:
    """Tokens of both messages count, including all markers and the last one."""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=100
    )
    tokenizer = Tokenizer.from_file(str(gpt_oss.pipeline.model / "tokenizer.json"))

    assert len(tokenizer.encode(MEDIUM).ids) == answer.usage.completion_tokens
