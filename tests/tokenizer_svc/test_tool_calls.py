"""Tools and reasoning through the service: what the generator is sent, and what callers get."""

import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.tokenizer_svc import sample_templates as templates
from tests.tokenizer_svc.conftest import Stage, running, user, write_model
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.scripted_generator import (
    code_of,
    fails_after,
    finish,
    message_of,
    says,
    says_until_stopped,
    update,
)
from tokenizer_svc.models import load_model
from trivium.chat.v1 import chat_pb2
from trivium.generator.v1 import generator_pb2
from trivium.wire.errors import ServiceError

STOP_TOKEN = generator_pb2.FINISH_REASON_STOP_TOKEN
LENGTH = generator_pb2.FINISH_REASON_LENGTH

FAMILIES = {
    "smollm2": (templates.SMOLLM2, byte_level()),
    "qwen3": (templates.QWEN3, byte_level(plain=templates.QWEN_PLAIN_TOKENS)),
    "mistral": (templates.MISTRAL, byte_level(templates.MISTRAL_TOKENS)),
    "harmony": (templates.HARMONY, byte_level(templates.HARMONY_TOKENS)),
    "llama3": (templates.LLAMA31, byte_level(templates.LLAMA3_TOKENS)),
    "deepseek": (
        templates.DEEPSEEK_R1,
        byte_level(templates.DEEPSEEK_TOKENS, templates.DEEPSEEK_PLAIN_TOKENS),
    ),
}

ADD = chat_pb2.Tool(
    function=chat_pb2.FunctionTool(
        name="add",
        description="Adds.",
        parameters='{"type": "object", "properties": {"a": {"type": "integer"}}}',
    )
)
NOW = chat_pb2.Tool(
    function=chat_pb2.FunctionTool(
        name="now", description="Time.", parameters='{"type": "object", "properties": {}}'
    )
)
NONE = chat_pb2.ToolChoice(mode=chat_pb2.TOOL_CHOICE_MODE_NONE)
REQUIRED = chat_pb2.ToolChoice(mode=chat_pb2.TOOL_CHOICE_MODE_REQUIRED)
ONLY_NOW = chat_pb2.ToolChoice(mode=chat_pb2.TOOL_CHOICE_MODE_FUNCTION, function_name="now")

ALLOWED_NOW = chat_pb2.ToolChoice(allowed_tools=chat_pb2.AllowedTools(function_names=["now"]))

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

Open = Callable[[str], Any]


@pytest.fixture
async def family(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    """The stage with a model of the family that the test names."""
    template, tokenizer = FAMILIES[request.param]
    folder = write_model(tmp_path / "tiny", template, tokenizer, context_length=4096)
    model = load_model(folder, variables=frozenset(("enable_thinking",)))
    async with running(model, folder) as stage:
        yield stage


def of(*names: str) -> Any:
    return pytest.mark.parametrize("family", names, indirect=True)


def ids(stage: Stage, text: str) -> list[int]:
    """The token ids of a model's output, including control tokens."""
    for token in sorted(stage.model.tokenizer.control_tokens, key=len, reverse=True):
        text = text.replace(token, stage.model.tokenizer.control_name(token))
    return stage.encode(text)


def script(stage: Stage, text: str, reason: Any = STOP_TOKEN) -> None:
    """The model writes this, one token per message."""
    token_ids = ids(stage, text)
    messages = [message_of(update(0, [token_id])) for token_id in token_ids]
    end = [2] if reason is STOP_TOKEN else []
    tokens = len(token_ids) + len(end)
    stage.generator.script = says(
        [*messages, message_of(update(0, end), finish(0, reason, tokens))]
    )


def told(stage: Stage) -> generator_pb2.StartGeneration:
    return stage.generator.calls[-1].start


async def whole(stage: Stage, **fields: Any) -> chat_pb2.CreateChatCompletionResponse:
    answer = await stage.chat.CreateChatCompletion(stage.request(**fields))
    assert isinstance(answer, chat_pb2.CreateChatCompletionResponse)
    return answer


CALLS = {
    "smollm2": CALL,
    "qwen3": f"<think>\nHm <tool_call>.\n</think>\n\n{CALL}",
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]',
    "harmony": "<|channel|>analysis<|message|>Hm <tool_call>.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}',
    "llama3": '{"name": "add", "parameters": {"a": 1}}',
    "deepseek": f"Hm <tool_call>.\n</think>\n\n{CALL}",
}


@pytest.mark.parametrize(("family", "text"), list(CALLS.items()), indirect=["family"])
async def test_each_familys_calls_are_parsed(family: Stage, text: str) -> None:
    """Every family's call becomes a tool call with an id, apart from the reasoning."""
    script(family, text)
    answer = await whole(family, tools=[ADD, NOW])
    [choice] = answer.choices
    [call] = choice.tool_calls
    reasons = "Hm <tool_call>." if "Hm" in text else ""

    assert ("add", '{"a": 1}') == (call.name, call.arguments)
    assert re.fullmatch("[a-zA-Z0-9]{9}" if "[TOOL_CALLS]" in text else "call_[0-9a-f]+", call.id)
    assert ("", reasons) == (choice.content, choice.reasoning_content)
    assert chat_pb2.FINISH_REASON_TOOL_CALLS == choice.finish_reason
    assert bool(reasons) == (answer.usage.reasoning_tokens > 0)


@of("qwen3")
async def test_a_call_comes_in_fragments(family: Stage) -> None:
    """Id and name are in the first fragment only; arguments come in pieces; the index stays."""
    second = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    script(family, f"Well.\n{CALL}\n{second}")
    events = await family.stream(tools=[ADD, NOW])
    deltas = [event.delta for event in events if event.HasField("delta")]
    fragments = [fragment for delta in deltas for fragment in delta.tool_calls]
    first = [fragment for fragment in fragments if fragment.index == 0]

    assert ["add", "now"] == [fragment.name for fragment in fragments if fragment.HasField("name")]
    assert len({fragment.id for fragment in fragments if fragment.HasField("id")}) == 2
    assert first[0].HasField("id")
    assert len(first) > 2
    assert '{"a": 1}' == "".join(fragment.arguments for fragment in first)
    assert sorted(fragment.index for fragment in fragments) == [f.index for f in fragments]
    assert "Well." == "".join(delta.content for delta in deltas)
    assert chat_pb2.FINISH_REASON_TOOL_CALLS == deltas[-1].finish_reason
    assert [] == list(deltas[-1].tool_calls)


@of("smollm2")
async def test_unary_and_streamed_calls_are_equal(family: Stage) -> None:
    """A stream's fragments joined are the unary answer's arguments."""
    script(family, CALL)
    [choice] = (await whole(family, tools=[ADD])).choices
    events = await family.stream(tools=[ADD])
    fragments = [fragment for event in events for fragment in event.delta.tool_calls]

    assert choice.tool_calls[0].arguments == "".join(f.arguments for f in fragments)


@of("smollm2", "qwen3")
async def test_without_tools_nothing_is_a_call(family: Stage) -> None:
    """Without tools, or with tool_choice `none`, markers are text."""
    for fields in ({}, {"tools": [ADD], "tool_choice": NONE}):
        script(family, CALL)
        [choice] = (await whole(family, **fields)).choices

        assert ([], CALL) == (list(choice.tool_calls), choice.content)
        assert chat_pb2.FINISH_REASON_STOP == choice.finish_reason
        assert not told(family).HasField("constraint")


@of("smollm2")
async def test_malformed_calls_are_text(family: Stage) -> None:
    """A call of a function that was not offered is text, for example."""
    script(family, CALL.replace("add", "sub"))
    [choice] = (await whole(family, tools=[ADD])).choices

    assert ([], CALL.replace("add", "sub")) == (list(choice.tool_calls), choice.content)


@of("smollm2")
async def test_a_truncated_call(family: Stage) -> None:
    """The answer has the arguments so far, and its finish reason is `length`."""
    script(family, '<tool_call>\n{"name": "add", "arguments": {"a"', LENGTH)
    [choice] = (await whole(family, tools=[ADD])).choices

    assert '{"a"' == choice.tool_calls[0].arguments
    assert chat_pb2.FINISH_REASON_LENGTH == choice.finish_reason


@of("smollm2")
async def test_tool_choice_none_leaves_the_tools_out_of_the_prompt(family: Stage) -> None:
    """With tool_choice `none` the prompt is the one without tools; otherwise it describes them, as
    this template does not support tools."""
    prompts = []
    for fields in ({}, {"tools": [ADD], "tool_choice": NONE}, {"tools": [ADD]}):
        script(family, "Hi")
        await whole(family, **fields)
        prompts.append(family.model.tokenizer.decode(list(told(family).prompt_token_ids)))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    function = {"name": "add", "description": "Adds.", "parameters": schema}

    assert prompts[0] == prompts[1]
    assert json.dumps({"type": "function", "function": function}) in prompts[2]


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
async def test_calls_are_forced_by_a_grammar(family: Stage) -> None:
    """The grammar forces a call of any function, or of the named one."""
    for choice, names in ((REQUIRED, {"add", "now"}), (ONLY_NOW, {"now"})):
        family.generator.script = fails_after([], ServiceError("queue_full", "full"))
        with pytest.raises(grpc.aio.AioRpcError, match="full"):
            await whole(family, tools=[ADD, NOW], tool_choice=choice)
        lark = told(family).constraint.lark

        assert names == {("add", "now")[i] for i in (0, 1) if f"\ncall_{i}:" in lark}
        [body] = [line for line in lark.split("\n") if line.startswith("body: ")]
        assert "FIRST" not in body
        assert "final" not in body


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
async def test_allowed_tools_leave_the_prompt_as_it_is(family: Stage) -> None:
    """The prompt has all tools; the grammar has the calls of those allowed only."""
    prompts = []
    for choice in (None, ALLOWED_NOW):
        family.generator.script = fails_after([], ServiceError("queue_full", "full"))
        with pytest.raises(grpc.aio.AioRpcError, match="full"):
            await whole(family, tools=[ADD, NOW], tool_choice=choice)
        prompts.append(list(told(family).prompt_token_ids))
    lark = told(family).constraint.lark

    assert prompts[0] == prompts[1]
    assert "\ncall_1:" in lark
    assert "\ncall_0:" not in lark


async def test_calls_that_are_not_parsed_are_text(tmp_path: Path) -> None:
    """Without a tool parser the prompt has the tools and calls are text; none can be forced or
    ruled out."""
    template, tokenizer = FAMILIES["qwen3"]
    folder = write_model(tmp_path / "tiny", template, tokenizer, context_length=4096)
    async with running(load_model(folder, tool_parser="none"), folder) as stage:
        script(stage, f"<think>Hm.</think>{CALL}")
        [choice] = (await whole(stage, tools=[ADD, NOW])).choices
        prompt = stage.model.tokenizer.decode(list(told(stage).prompt_token_ids))
        refusals = []
        for choice_of in (REQUIRED, ONLY_NOW, ALLOWED_NOW):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await whole(stage, tools=[ADD, NOW], tool_choice=choice_of)
            refusals.append(code_of(refused.value))

    assert ("Hm.", CALL, []) == (choice.reasoning_content, choice.content, list(choice.tool_calls))
    assert not told(stage).HasField("constraint")
    assert "Adds." in prompt
    assert [("unsupported_parameter", "tool_choice")] * 3 == refusals


@of("qwen3")
async def test_schema_errors_name_the_tool(family: Stage) -> None:
    """The error names the tool by its position in the request, even if others were left out."""
    fault = "The lark cannot be used: at 7(9): failed to compile JSON schema: no\n   7 | x"
    family.generator.script = fails_after([], ServiceError("invalid_value", fault, "constraint"))
    lark_line = 7
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await whole(family, tools=[ADD, NOW], tool_choice=ONLY_NOW)
    line = told(family).constraint.lark.split("\n")[lark_line - 1]

    assert line.startswith("call_1:")
    assert ("invalid_json_schema", "tools[1].function.parameters") == code_of(refused.value)
    assert "| x" not in (refused.value.details() or "")


@of("deepseek", "qwen3", "harmony")
async def test_stop_strings_apply_to_the_answer_only(family: Stage) -> None:
    """Reasoning may contain them."""
    text = {
        "<｜Assistant｜>": "one END two</think>three END four",  # noqa: RUF001
        "<|im_start|>": "<think>one END two</think>three END four",
    }
    harmony = (
        "<|channel|>analysis<|message|>one END two<|end|><|start|>assistant"
        "<|channel|>final<|message|>three END four"
    )
    tokens = family.model.tokenizer.control_tokens
    said = next((text[token] for token in text if token in tokens), harmony)
    messages = [message_of(update(0, [token_id])) for token_id in ids(family, said)]
    family.generator.script = says_until_stopped(messages)
    [choice] = (await whole(family, stop=["END"])).choices

    assert ("one END two", "three ") == (choice.reasoning_content, choice.content)
    assert "END" == choice.matched_stop


@of("qwen3")
async def test_reasoning_tokens_are_counted(family: Stage) -> None:
    """Reasoning tokens include the markers; an answer without reasoning has none."""
    thought = ids(family, "<think>\nHm, let me see.\n</think>")
    script(family, "<think>\nHm, let me see.\n</think>\n\nHi")
    reasoned = await whole(family)
    script(family, "Hi")
    plain = await whole(family)

    assert len(thought) == reasoned.usage.reasoning_tokens
    assert 0 == plain.usage.reasoning_tokens


@of("qwen3")
async def test_no_reasoning_if_the_prompt_closed_it(family: Stage) -> None:
    """If the prompt closed the reasoning, what looks like reasoning is part of the answer."""
    script(family, "<think>x</think>y")
    answer = await whole(family, chat_template_kwargs={"enable_thinking": "false"})

    assert ("<think>x</think>y", "") == (
        answer.choices[0].content,
        answer.choices[0].reasoning_content,
    )


@of("qwen3")
async def test_reasoning_is_streamed(family: Stage) -> None:
    """Reasoning is streamed as it comes, before the answer."""
    script(family, "<think>one two three</think>four")
    events = await family.stream()
    reasoning = [e.delta.reasoning_content for e in events if e.delta.reasoning_content]

    assert len(reasoning) > 1
    assert "one two three" == "".join(reasoning)
    assert "four" == "".join(event.delta.content for event in events)


@of("qwen3", "harmony")
async def test_logprobs_cover_the_answer_only(family: Stage) -> None:
    """Reasoning, markers and calls have no log-probabilities; the bytes are the content's."""
    harmony = "<|channel|>" in family.model.tokenizer.control_tokens
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        "<|channel|>final<|message|>It is é."
        if harmony
        else f"<think>\nHm.\n</think>\n\nIt is é.\n{CALL}"
    )
    token_ids = ids(family, text)
    entry = generator_pb2.TokenLogprobs(logprob=-1.0)
    messages = [message_of(update(0, [token_id], [entry])) for token_id in token_ids]
    last = message_of(update(0, [2], [entry]), finish(0, STOP_TOKEN, len(token_ids) + 1))
    family.generator.script = says([*messages, last])
    [choice] = (await whole(family, tools=[ADD], logprobs=True)).choices

    assert "It is é." == choice.content
    assert "It is é." == b"".join(e.bytes for e in choice.logprobs).decode().strip()


@of("harmony")
async def test_harmony_without_tools(family: Stage) -> None:
    """Channels are parsed without tools too, and markers never show."""
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    script(family, said)
    [choice] = (await whole(family)).choices

    assert ("Hm.", "Hi") == (choice.reasoning_content, choice.content)
    assert not told(family).HasField("constraint")


@of("qwen3")
async def test_calls_and_results_in_the_history(family: Stage) -> None:
    """The template renders them."""
    call = chat_pb2.ToolCall(id="c1", name="add", arguments='{"a":1}')
    messages = [
        user("x"),
        chat_pb2.ChatMessage(
            role=chat_pb2.ROLE_ASSISTANT, tool_calls=[call], reasoning_content="Hm."
        ),
        chat_pb2.ChatMessage(
            role=chat_pb2.ROLE_TOOL, tool_call_id="c1", content=[chat_pb2.ContentPart(text="1")]
        ),
    ]
    script(family, "One.")
    await whole(family, messages=messages, tools=[ADD])
    prompt = family.model.tokenizer.decode(list(told(family).prompt_token_ids))

    assert "<think>\nHm.\n</think>\n\n" + CALL in prompt
    assert "<tool_response>\n1\n</tool_response>" in prompt
