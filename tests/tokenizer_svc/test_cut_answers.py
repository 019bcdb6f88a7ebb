"""Answers cut off at every character and at every token never show markup.

Complete answers with reasoning, text and calls are the reference: a truncated answer is a prefix of
the complete one, with its last call as far as it goes.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizer_svc import sample_templates as templates
from tests.tokenizer_svc.conftest import Stage, running, write_model
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.scripted_generator import finish, message_of, says, update
from tests.tokenizer_svc.test_families import MARKERS, NAMES, Calls, Result, read
from tests.tokenizer_svc.test_tool_calls import ADD, FAMILIES, LENGTH, NOW, STOP_TOKEN, ids
from tokenizer_svc.families.harmony import HarmonyParser
from tokenizer_svc.families.hermes import HermesParser
from tokenizer_svc.families.llama3_json import Llama3JsonParser
from tokenizer_svc.families.mistral import MistralParser
from tokenizer_svc.families.parser import Parser
from tokenizer_svc.families.thinking import Thinking, ThinkingParser
from tokenizer_svc.models import load_model
from trivium.chat.v1 import chat_pb2

A = '{"a": 1, "b": ["x < y", {"c": null}]}'
C = '{"city": "Köln [TOOL] </tool"}'
HERMES = (
    f'<tool_call>\n{{"name": "add", "arguments": {A}}}\n</tool_call>'
    f'\n<tool_call>\n{{"name": "get_weather", "arguments": {C}}}\n</tool_call>'
)
CALLS = [("add", A), ("get_weather", C)]
THOUGHT = "Is a < b? </thin> is no end."
THINKING = f"\n{THOUGHT}\n</think>\n\n"
ANALYSIS = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
REMARK = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"


def harmony_call(name: str, arguments: str) -> str:
    return (
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
    )


def thinks(state: Thinking) -> Callable[[], Parser]:
    return lambda: ThinkingParser(state, HermesParser(NAMES))


COMPLETE: dict[str, tuple[Callable[[], Parser], str, Result]] = {
    "hermes": (lambda: HermesParser(NAMES), f"I look.\n{HERMES}", ("", "I look.", CALLS)),
    "thinking": (
        thinks(Thinking.POSSIBLE),
        f"\n<think>{THINKING}I look.\n{HERMES}\n",
        (THOUGHT, "I look.", CALLS),
    ),
    "thinking, opened": (
        thinks(Thinking.OPENED),
        f"{THINKING}I look.\n{HERMES}",
        (THOUGHT, "I look.", CALLS),
    ),
    "llama3, tagged": (
        lambda: Llama3JsonParser(NAMES),
        f'<|python_tag|>{{"name": "add", "parameters": {A}}}; '
        f'{{"name": "get_weather", "parameters": {C}}}',
        ("", "", CALLS),
    ),
    "llama3": (
        lambda: Llama3JsonParser(NAMES),
        f'{{"name": "add", "parameters": {A}}}',
        ("", "", [("add", A)]),
    ),
    "mistral": (
        lambda: MistralParser(NAMES),
        f'I look.[TOOL_CALLS] [{{"name": "add", "arguments": {A}}}, '
        f'{{"name": "get_weather", "arguments": {C}}}]',
        ("", "I look.", CALLS),
    ),
    "mistral, named": (
        lambda: MistralParser(NAMES),
        f"I look.[TOOL_CALLS]add[ARGS]{A}[TOOL_CALLS]get_weather[CALL_ID]aB3[ARGS]{C}",
        ("", "I look.", CALLS),
    ),
    "harmony": (
        lambda: HarmonyParser(NAMES),
        ANALYSIS
        + REMARK
        + f"{harmony_call('add', A)}<|start|>assistant{harmony_call('get_weather', C)}",
        (THOUGHT, "I look.", CALLS),
    ),
    "harmony, recipient first": (
        lambda: HarmonyParser(NAMES),
        f" to=functions.add<|channel|>commentary json<|message|>{A}<|call|>",
        ("", "", [("add", A)]),
    ),
    "harmony, text": (
        lambda: HarmonyParser(NAMES),
        f"{ANALYSIS}<|channel|>final<|message|>Hi.<|return|>",
        (THOUGHT, "Hi.", []),
    ),
}


def check_beginning(part: Result, whole: Result) -> None:
    """`part` is a prefix of `whole`, apart from white space before a marker, which belongs to
    neither.

    A character cut in two shows as U+FFFD.
    """
    reasoning, content, calls = part
    assert whole[0].startswith(reasoning.rstrip("\ufffd").rstrip())
    assert whole[1].startswith(content.rstrip("\ufffd").rstrip())
    assert len(calls) <= len(whole[2])
    for (name, arguments), (whole_name, whole_arguments) in zip(calls, whole[2], strict=False):
        assert name == whole_name
        assert whole_arguments.startswith(arguments.rstrip("\ufffd"))
    for earlier, whole_call in zip(calls[:-1], whole[2], strict=False):
        assert earlier == whole_call


@pytest.mark.parametrize("name", COMPLETE)
def test_truncated_at_every_character(name: str) -> None:
    """Markers are spelled out in letters here; how the output is split makes no difference."""
    parser, output, whole = COMPLETE[name]
    assert whole == read(parser(), [output])
    lengths = []
    for end in range(len(output) + 1):
        cut = output[:end]
        part = read(parser(), [cut], MARKERS)
        pieces = [cut[at : at + 5] for at in range(0, end, 5)]

        check_beginning(part, whole)
        assert part == read(parser(), list(cut), MARKERS)
        assert part == read(parser(), pieces, MARKERS)
        lengths.append(sum(len(arguments) for _, arguments in part[2]))
    assert sorted(lengths) == lengths, "a longer output has fewer arguments"
    assert len(set(lengths)) > len("".join(arguments for _, arguments in whole[2])) * 0.9


@dataclass(frozen=True)
class ModelOutput:
    """What a model of a family writes, part by part, using everything its format allows."""

    template: str
    tokenizer: str
    thought: str
    remark: str
    call: str
    another: str

    @property
    def output(self) -> str:
        return self.thought + self.remark + self.call + self.another

    @property
    def whole(self) -> Result:
        calls = [("add", D), ("now", E)] if self.another else [("add", D)]
        return "Hm é." if self.thought else "", "I look." if self.remark else "", calls


D, E = '{"a": 1}', "{}"
HERMES_ADD = f'<tool_call>\n{{"name": "add", "arguments": {D}}}\n</tool_call>'
HERMES_NOW = f'\n<tool_call>\n{{"name": "now", "arguments": {E}}}\n</tool_call>'
MODEL_OUTPUTS = {
    "smollm2": ModelOutput(*FAMILIES["smollm2"], "", "I look.\n", HERMES_ADD, HERMES_NOW),
    "qwen3": ModelOutput(
        *FAMILIES["qwen3"], "<think>\nHm é.\n</think>\n\n", "I look.\n", HERMES_ADD, HERMES_NOW
    ),
    "deepseek": ModelOutput(
        *FAMILIES["deepseek"], "Hm é.\n</think>\n\n", "I look.\n", HERMES_ADD, HERMES_NOW
    ),
    "mistral": ModelOutput(
        *FAMILIES["mistral"],
        "",
        "I look.",
        f'[TOOL_CALLS][{{"name": "add", "arguments": {D}}}',
        f', {{"name": "now", "arguments": {E}}}]',
    ),
    "mistral named": ModelOutput(
        templates.MISTRAL + "{#- [ARGS] #}",
        byte_level((*templates.MISTRAL_TOKENS, "[ARGS]")),
        "",
        "I look.",
        f"[TOOL_CALLS]add[ARGS]{D}",
        f"[TOOL_CALLS]now[ARGS]{E}",
    ),
    "llama3": ModelOutput(
        templates.LLAMA31,
        byte_level((*templates.LLAMA3_TOKENS, "<|python_tag|>")),
        "",
        "",
        f'<|python_tag|>{{"name": "add", "parameters": {D}}}',
        f'; {{"name": "now", "parameters": {E}}}',
    ),
    "harmony": ModelOutput(
        *FAMILIES["harmony"],
        "<|channel|>analysis<|message|>Hm é.<|end|><|start|>assistant",
        REMARK,
        harmony_call("add", D),
        "",
    ),
}
# The marker of calls takes several tokens here, so that the end of an answer can cut it in two.
WITH_MULTI_TOKEN_MARKERS = ("smollm2", "deepseek")
REQUIRED = chat_pb2.ToolChoice(mode=chat_pb2.TOOL_CHOICE_MODE_REQUIRED)
NAMED = chat_pb2.ToolChoice(mode=chat_pb2.TOOL_CHOICE_MODE_FUNCTION, function_name="add")
TOOLS = [ADD, NOW]


@pytest.fixture
async def scripted(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Stage, ModelOutput]]:
    """A model of the family that the test names, and what it writes."""
    written = MODEL_OUTPUTS[request.param]
    folder = write_model(
        tmp_path / "tiny", written.template, written.tokenizer, context_length=4096
    )
    model = load_model(folder)
    async with running(model, folder) as stage:
        yield stage, written


def of(*names: str) -> Any:
    return pytest.mark.parametrize("scripted", names, indirect=True)


def say(stage: Stage, token_ids: list[int], reason: Any, size: int = 1) -> None:
    """The model writes these tokens, `size` per message, and ends for this reason."""
    parts = [token_ids[at : at + size] for at in range(0, len(token_ids), size)]
    end = [2] if reason is STOP_TOKEN else []
    last = message_of(update(0, end), finish(0, reason, len(token_ids) + len(end)))
    stage.generator.script = says([*(message_of(update(0, part)) for part in parts), last])


async def whole(stage: Stage, **fields: Any) -> tuple[Result, Any]:
    """What the unary call returns, and its finish reason."""
    answer = await stage.chat.CreateChatCompletion(stage.request(**fields))
    [choice] = answer.choices
    calls = [(call.name, call.arguments) for call in choice.tool_calls]
    return (choice.reasoning_content, choice.content, calls), choice.finish_reason


async def streamed(stage: Stage, **fields: Any) -> tuple[Result, Any]:
    """What a stream says, joined, and its finish reason."""
    deltas = [e.delta for e in await stage.stream(**fields) if e.HasField("delta")]
    reasoning = "".join(delta.reasoning_content for delta in deltas)
    content = "".join(delta.content for delta in deltas)
    calls: Calls = []
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        if piece.HasField("name"):
            calls.append((piece.name, ""))
        calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return (reasoning, content, calls), deltas[-1].finish_reason


@of(*MODEL_OUTPUTS)
async def test_truncated_at_every_token(scripted: tuple[Stage, ModelOutput]) -> None:
    """Cut off at any token, an answer has the reason `length`, and a stream says the same."""
    stage, written = scripted
    token_ids = ids(stage, written.output)
    for end in range(len(token_ids) + 1):
        say(stage, token_ids[:end], LENGTH)
        part, reason = await whole(stage, tools=TOOLS)

        check_beginning(part, written.whole)
        assert chat_pb2.FINISH_REASON_LENGTH == reason
        say(stage, token_ids[:end], LENGTH, size=1 + end % 4)
        assert (part, reason) == await streamed(stage, tools=TOOLS)
    assert written.whole == part


@of(*(name for name in MODEL_OUTPUTS if name not in WITH_MULTI_TOKEN_MARKERS))
async def test_stopped_at_every_token(scripted: tuple[Stage, ModelOutput]) -> None:
    """A stop token in the middle of a marker or call shows no markup either."""
    stage, written = scripted
    token_ids = ids(stage, written.output)
    for end in range(len(token_ids) + 1):
        say(stage, token_ids[:end], STOP_TOKEN)
        part, reason = await whole(stage, tools=TOOLS)

        check_beginning(part, written.whole)
        assert (part, reason) == await streamed(stage, tools=TOOLS)


@of(*MODEL_OUTPUTS)
@pytest.mark.parametrize("choice", [REQUIRED, NAMED], ids=["required", "named"])
async def test_a_forced_call_is_never_content(
    scripted: tuple[Stage, ModelOutput], choice: chat_pb2.ToolChoice
) -> None:
    """This holds however much of the call there is and however it ended, even within a marker."""
    stage, written = scripted
    token_ids = ids(stage, written.thought + written.call)
    for reason in (LENGTH, STOP_TOKEN):
        for end in range(len(token_ids) + 1):
            say(stage, token_ids[:end], reason)
            (_, content, calls), _ = await whole(stage, tools=TOOLS, tool_choice=choice)

            assert "" == content.strip()
            assert [name for name, _ in calls] in ([], ["add"])
        assert [("add", D)] == calls


@of(*MODEL_OUTPUTS)
@pytest.mark.parametrize("reason", [LENGTH, STOP_TOKEN])
async def test_stop_strings_do_not_match_markup(
    scripted: tuple[Stage, ModelOutput], reason: Any
) -> None:
    """Stop strings do not match in calls, complete or not; no call follows a match in the text."""
    stage, written = scripted
    token_ids = ids(stage, written.output)
    call = len(ids(stage, written.thought + written.remark + written.call[:-4]))
    for end in (call, len(token_ids)):
        say(stage, token_ids[:end], reason)
        expected, _ = await whole(stage, tools=TOOLS)
        for stop in ('{"', "tool_call", "TOOL_CALLS", "commentary", "name", ">", "add", ": 1"):
            assert expected == (await whole(stage, tools=TOOLS, stop=[stop]))[0]
        if written.remark:
            part, why = await whole(stage, tools=TOOLS, stop=["look"])

            assert ("I ", [], chat_pb2.FINISH_REASON_STOP) == (*part[1:], why)


TEXT = "if a < b and x[0] <= {1} | <tool> [TOOL, </think <|x|> \n\n"
STARTS = ("<", "<tool", "[", "[TOOL_", '{"city', "<|", "t", "to=", "\n")


@of(*MODEL_OUTPUTS)
async def test_text_is_never_lost(scripted: tuple[Stage, ModelOutput]) -> None:
    """Text that looks like a marker is kept, unless it was cut off and markers are plain text."""
    stage, written = scripted
    has_multi_token_markers = written in (MODEL_OUTPUTS[name] for name in WITH_MULTI_TOKEN_MARKERS)
    harmony = written.thought.startswith("<|channel|>")
    before = "<|channel|>final<|message|>" if harmony else written.thought
    for text in (*(TEXT[:end] for end in range(len(TEXT) + 1)), *STARTS):
        for reason in (LENGTH, STOP_TOKEN):
            say(stage, ids(stage, before + text), reason)
            (_, content, calls), _ = await whole(stage, tools=TOOLS)
            rest = text.removeprefix(content).strip()

            assert [] == calls
            assert "" == rest or (
                has_multi_token_markers and reason is LENGTH and "<tool_call>".startswith(rest)
            ), (text, content)


@of(*MODEL_OUTPUTS)
async def test_finish_reasons_of_calls(scripted: tuple[Stage, ModelOutput]) -> None:
    """A call that the caller forced by name ends with `stop`, as OpenAI's do."""
    stage, written = scripted
    token_ids = ids(stage, written.thought + written.call)
    for choice, ended in (
        (None, chat_pb2.FINISH_REASON_TOOL_CALLS),
        (REQUIRED, chat_pb2.FINISH_REASON_TOOL_CALLS),
        (NAMED, chat_pb2.FINISH_REASON_STOP),
    ):
        for reason, expected in (
            (STOP_TOKEN, ended),
            (LENGTH, chat_pb2.FINISH_REASON_LENGTH),
        ):
            say(stage, token_ids, reason)
            for ask in (whole, streamed):
                part, why = await ask(stage, tools=TOOLS, tool_choice=choice)

                assert ([("add", D)], expected) == (part[2], why)
