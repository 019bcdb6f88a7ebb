"""Parsers of the families' formats give the same result however the output is split into pieces."""

import json
import sys
from collections.abc import Callable, Set
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer_svc.families import harmony, hermes, llama3_json, mistral, thinking
from tokenizer_svc.families.harmony import HarmonyParser
from tokenizer_svc.families.hermes import HermesParser
from tokenizer_svc.families.llama3_json import Llama3JsonParser
from tokenizer_svc.families.mistral import MistralParser
from tokenizer_svc.families.parser import (
    CallArguments,
    CallStart,
    Channel,
    Parser,
    PlainParser,
    Segment,
)
from tokenizer_svc.families.thinking import Thinking, ThinkingParser

NAMES = {"add", "get_weather"}

PARSERS: dict[str, Callable[[], Parser]] = {
    "hermes": lambda: HermesParser(NAMES),
    "llama3_json": lambda: Llama3JsonParser(NAMES),
    "mistral": lambda: MistralParser(NAMES),
    "harmony": lambda: HarmonyParser(NAMES),
    "thinking": lambda: ThinkingParser(Thinking.POSSIBLE, PlainParser()),
    "opened": lambda: ThinkingParser(Thinking.OPENED, PlainParser()),
    "qwen3": lambda: ThinkingParser(Thinking.POSSIBLE, HermesParser(NAMES)),
}

Calls = list[tuple[str, str]]
Result = tuple[str, str, Calls]
"""Reasoning, content, calls."""


def read(parser: Parser, pieces: list[str], cut: Set[str] = frozenset()) -> Result:
    """All segments joined; each text must be at the position it states."""
    whole, segments = "".join(pieces), []
    start = 0
    for piece in pieces:
        segments += parser.push(piece, start)
        start += len(piece)

        assert 0 <= parser.held <= start
    segments += parser.flush(cut)
    return joined(segments, whole)


def joined(segments: list[Segment], whole: str) -> Result:
    texts = {Channel.REASONING: "", Channel.CONTENT: ""}
    calls: Calls = []
    for segment in segments:
        if isinstance(segment, CallStart):
            calls.append((segment.name, ""))
        elif isinstance(segment, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + segment.text)
        else:
            assert segment.text == whole[segment.start : segment.start + len(segment.text)]
            texts[segment.channel] += segment.text
    return texts[Channel.REASONING], texts[Channel.CONTENT], calls


A = '{"a": 1, "b": [true, null, -0.5e3, "é\\n\\u00e9 } ]"]}'
W = '{"city": "Köln"}'

HERMES_ADD = f'<tool_call>\n{{"name": "add", "arguments": {A}}}\n</tool_call>'
HERMES_WEATHER = f'<tool_call>\n{{"name": "get_weather", "arguments": {W}}}\n</tool_call>'

OUTPUTS: list[tuple[str, str, Result]] = [
    ("hermes", "Hello <tool> {}\n\n", ("", "Hello <tool> {}\n\n", [])),
    ("hermes", HERMES_ADD, ("", "", [("add", A)])),
    (
        "hermes",
        f"Let me see.\n{HERMES_ADD}\n{HERMES_WEATHER}\n",
        ("", "Let me see.", [("add", A), ("get_weather", W)]),
    ),
    ("hermes", f"{HERMES_ADD}\n\nDone.", ("", "\n\nDone.", [("add", A)])),
    ("hermes", HERMES_ADD.removesuffix("</tool_call>"), ("", "", [("add", A)])),
    (
        "hermes",
        HERMES_ADD.removesuffix("\n</tool_call>") + HERMES_WEATHER,
        ("", "", [("add", A), ("get_weather", W)]),
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a', ("", "", [("add", '{"a')])),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', ("", "", [("add", "{}")])),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        ("", "", [("add", '{"a": 1}')]),
    ),
    (
        "hermes",
        '<tool_call>{"id": 7, "name": "add", "x": {}, "parameters": {}}</tool_call>',
        ("", "", [("add", "{}")]),
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {json.dumps(A)}}}</tool_call>',
        ("", "", [("add", A)]),
    ),
    ("llama3_json", "Hello {", ("", "Hello {", [])),
    ("llama3_json", "  \n", ("", "  \n", [])),
    ("llama3_json", f'{{"name": "add", "parameters": {A}}}', ("", "", [("add", A)])),
    (
        "llama3_json",
        f'\n<|python_tag|>{{"name": "add", "parameters": {A}}}; '
        f'{{"name": "get_weather", "parameters": {W}}}',
        ("", "", [("add", A), ("get_weather", W)]),
    ),
    ("llama3_json", f'{{"name": "add", "parameters": {A}}} ok', ("", " ok", [("add", A)])),
    ("mistral", "Hello [TOOL] [", ("", "Hello [TOOL] [", [])),
    (
        "mistral",
        f'Hm.[TOOL_CALLS] [{{"name": "add", "arguments": {A}}}, '
        f'{{"name": "get_weather", "arguments": {W}}}]',
        ("", "Hm.", [("add", A), ("get_weather", W)]),
    ),
    (
        "mistral",
        f"[TOOL_CALLS]add[ARGS]{A}[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{W}",
        ("", "", [("add", A), ("get_weather", W)]),
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm < 3.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Hi <|x|>.",
        ("Hm < 3.", "Hi <|x|>.", []),
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
        f" to=functions.add <|constrain|>json<|message|>{A}",
        ("Hm.", "", [("add", A)]),
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.add"
        f"<|channel|>commentary json<|message|> {A}<|call|>",
        ("", "I look.", [("add", A)]),
    ),
    ("harmony", "Hello there", ("", "Hello there", [])),
    ("harmony", "<|channel|>analysis<|message|>cut of", ("cut of", "", [])),
    ("thinking", "Hello <think>", ("", "Hello <think>", [])),
    ("thinking", "\n<thin", ("", "\n<thin", [])),
    ("thinking", "<think>\nHm.\n\n</think>\n\nHi.\n", ("Hm.", "Hi.\n", [])),
    ("thinking", "\n<think></think>", ("", "", [])),
    ("thinking", "<think>never </thin ends\n", ("never </thin ends\n", "", [])),
    ("opened", "\nHm.</think>Hi", ("Hm.", "Hi", [])),
    ("opened", "<think>Hm.</think>Hi", ("Hm.", "Hi", [])),
    ("opened", "<hm> x", ("<hm> x", "", [])),
    ("qwen3", f"<think>a {HERMES_ADD}</think>{HERMES_ADD}", (f"a {HERMES_ADD}", "", [("add", A)])),
]

# What looks like a call but is not one is text, down to the last character.
MALFORMED: list[tuple[str, str]] = [
    ("hermes", "a <tool_call>\nadd(1, 2)\n</tool_call> b"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": 7}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": "no object"}</tool_call>'),
    ("hermes", '<tool_call>{"name": 7}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "name": "add"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("hermes", "a <tool_cal"),
    ("hermes", '<tool_call>{"name" "add"}'),
    ("hermes", '<tool_call>{"name": "add",}'),
    ("hermes", '<tool_call>{"x": 01, "name": "add"}'),
    ("llama3_json", '{"name": "Bob", "age": 7}'),
    ("llama3_json", '<|python_tag|>print("hi")'),
    ("llama3_json", "<|python_"),
    ("llama3_json", '{"city": "Köln"}'),
    ("llama3_json", ' {"city": "K'),
    ("llama3_json", '{"name": "Bob'),
    ("mistral", "a [TOOL_CALL"),
    ("mistral", "[TOOL_CALLS]Hello there"),
    ("mistral", "x [TOOL_CALLS] [1, 2]"),
    ("mistral", '[TOOL_CALLS][{"name": "nobody"}]'),
    ("mistral", "[TOOL_CALLS]nobody[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]" + "x" * 1000 + "{}"),
    ("harmony", "no header <|end|"),
    ("harmony", "x" * 600),
]


@pytest.mark.parametrize(("family", "output", "expected"), OUTPUTS)
def test_each_familys_output_is_parsed(family: str, output: str, expected: Result) -> None:
    """Reasoning, text and calls are told apart; white space around calls is dropped."""
    assert expected == read(PARSERS[family](), [output])
    assert expected == read(PARSERS[family](), list(output))


@pytest.mark.parametrize(("family", "output"), MALFORMED)
def test_malformed_calls_are_text(family: str, output: str) -> None:
    """No text is lost, and none of it becomes a call."""
    assert ("", output, []) == read(PARSERS[family](), [output])
    assert ("", output, []) == read(PARSERS[family](), list(output))


# Calls that were cut off: some are reported as far as they go, others not at all.
UNFINISHED: list[tuple[str, str, Calls]] = [
    ("hermes", "<tool_call>", []),
    ("hermes", '\n<tool_call>\n{"name": "ad', []),
    ("hermes", '<tool_call>{"name": "add', []),
    ("hermes", ' <tool_call> \n{"name": "add", "argu', [("add", "")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": ', [("add", "")]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "ad', []),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"', [("add", '{"a": 1}')]),
    ("hermes", f'{HERMES_ADD}\n<tool_call>\n{{"name": "', [("add", A)]),
    ("llama3_json", ' {"na', []),
    ("llama3_json", "<|python_tag|>", []),
    ("llama3_json", '<|python_tag|>{"parameters": {"a"', []),
    ("llama3_json", '{"name": "add", "para', [("add", "")]),
    ("llama3_json", f'{{"name": "add", "parameters": {A}}}; {{"name', [("add", A)]),
    ("mistral", "[TOOL_CALLS]", []),
    ("mistral", '[TOOL_CALLS] [{"name": "add"', [("add", "")]),
    ("mistral", f'[TOOL_CALLS][{{"name": "add", "arguments": {A}}}, {{"name', [("add", A)]),
    ("mistral", "[TOOL_CALLS]add", []),  # it may be the beginning of a longer name
    ("mistral", "[TOOL_CALLS]add[", [("add", "")]),
    ("mistral", "[TOOL_CALLS]get_weather[CALL_ID]abc123", [("get_weather", "")]),
    ("mistral", "[TOOL_CALLS]add[ARGS]", [("add", "")]),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{A}[TOOL_CALLS]get_w", [("add", A)]),
    ("harmony", "<|channel|>commentary to=functions.add", []),
    ("harmony", "<|channel|>commentary to=functions.add ", [("add", "")]),
    ("harmony", " to=functions.add<|channel|>comm", [("add", "")]),
    ("harmony", "<|channel|>commentary to=functions.add<|message|> ", [("add", "")]),
    ("harmony", "<|channel|>commentary to=functions.sub <|constrain|>json", []),
]


@pytest.mark.parametrize(("family", "output", "calls"), UNFINISHED)
def test_unfinished_calls_are_not_text(family: str, output: str, calls: Calls) -> None:
    """They are reported as far as they go once the name is complete, and not at all before."""
    assert ("", "", calls) == read(PARSERS[family](), [output])
    assert ("", "", calls) == read(PARSERS[family](), list(output))


def test_a_call_without_arguments_in_harmony() -> None:
    """An empty message to a function is a call without arguments, as in other formats."""
    output = "<|channel|>commentary to=functions.add<|message|> <|call|><|start|>"

    assert ("", "", [("add", "{}")]) == read(PARSERS["harmony"](), [output])


def test_malformed_arguments_end_the_call() -> None:
    """What was sent cannot be taken back; the rest is text, and a later call is parsed."""
    output = f'<tool_call>{{"name": "add", "arguments": {{"a": tru? }}}}</tool_call>{HERMES_ADD}'
    expected = ("", "? }}</tool_call>", [("add", '{"a": tru'), ("add", A)])

    assert expected == read(PARSERS["hermes"](), [output])
    assert expected == read(PARSERS["hermes"](), list(output))


def test_space_before_a_malformed_call_is_not_text() -> None:
    """The space preceded what was sent as a call, and must not appear after it."""
    output = ' {"name": "add", "arguments": {?'
    expected = ("", "?", [("add", "{")])

    assert expected == read(PARSERS["llama3_json"](), [output])
    assert expected == read(PARSERS["llama3_json"](), list(output))


def test_arguments_are_streamed() -> None:
    """Each piece is sent at once; the name comes first, and only once."""
    parser, start = PARSERS["hermes"](), 0
    seen: list[list[Segment]] = []
    for piece in ('<tool_call>\n{"name": "ad', 'd", "argu', 'ments": {"a"', ": 1", "}}", "\n"):
        seen.append(parser.push(piece, start))
        start += len(piece)

    assert [
        [],
        [],
        [CallStart("add"), CallArguments('{"a"')],
        [CallArguments(": 1")],
        [CallArguments("}")],
        [],
    ] == seen


MARKERS = (
    hermes.MARKERS | llama3_json.MARKERS | mistral.MARKERS | harmony.MARKERS | thinking.MARKERS
)

alphabet = st.sampled_from(
    [
        *'<>{}[]",:; \n\\ax17',
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]"),
        *("<|python_tag|>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "assistant"),
        *('{"name": "add", "arguments": {', '{"name": "add", "parameters": {}}', "}}", '"a": 1'),
        *("analysis", "final", "commentary to=functions.add", "add", "name", "<tool", "_call>"),
    ]
)


@pytest.mark.parametrize("family", PARSERS)
@given(
    pieces=st.lists(alphabet, max_size=14),
    cuts=st.lists(st.integers(1, 9), max_size=12),
    markers=st.sets(st.sampled_from(sorted(MARKERS))),
)
def test_any_split_of_the_output_parses_the_same(
    family: str, pieces: list[str], cuts: list[int], markers: set[str]
) -> None:
    """Any output gives the same result whole, character by character, and in any other pieces."""
    output = "".join(pieces)
    cut, position = [], 0
    for length in cuts:
        cut.append(output[position : position + length])
        position += length
    expected = read(PARSERS[family](), [output], markers)

    assert expected == read(PARSERS[family](), list(output), markers)
    assert expected == read(PARSERS[family](), [*cut, output[position:]], markers)


@pytest.mark.parametrize("family", PARSERS)
@given(pieces=st.lists(alphabet, max_size=14))
def test_held_text_comes_after_decided_text(family: str, pieces: list[str]) -> None:
    """Text that comes out later lies after everything that was decided before."""
    parser, start, decided = PARSERS[family](), 0, 0
    for piece in [*pieces, ""]:
        segments = parser.push(piece, start) if piece else parser.flush()
        for segment in segments:
            if not isinstance(segment, CallStart | CallArguments):
                assert decided <= segment.start
        start += len(piece)
        decided = start - parser.held


HOSTILE = {
    "open braces": lambda size: "{" * size,
    "open calls": lambda size: "<tool_call>" * (size // 11),
    "open objects": lambda size: '<tool_call>{"a":' + '{"a":' * (size // 5),
    "open lists": lambda size: '{"name": "add", "parameters": {"a": ' + "[" * size,
    "only spaces": lambda size: " " * size,
    "spaces": lambda size: "<think>" + " " * size,
    "spaces behind a call": lambda size: HERMES_ADD + " " * size,
    "a long name": lambda size: '<tool_call>{"name": "' + "a" * size,
    "a long number": lambda size: '<tool_call>{"a": ' + "1" * size,
    "marks": lambda size: "[TOOL_CALLS]" * (size // 12),
    "almost marks": lambda size: "<tool_cal" * (size // 9),
    "headers": lambda size: "<|start|>" * (size // 9),
    "list items": lambda size: "[TOOL_CALLS][" + '{"name": "add"}, ' * (size // 17),
}


def operations(work: Callable[[], Any]) -> int:
    """The number of trace events while it runs, which is about the number of Python lines."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("family", PARSERS)
def test_time_is_linear(family: str, hostile: str) -> None:
    """Four times the output takes about four times the work, whole and character by character."""
    small, large = HOSTILE[hostile](1_000), HOSTILE[hostile](4_000)
    whole = [operations(lambda text=text: read_raw(family, [text])) for text in (small, large)]
    single = [operations(lambda text=text: read_raw(family, [*text])) for text in (small, large)]

    assert whole[1] <= 4.5 * whole[0] + 2_000
    assert single[1] <= 4.5 * single[0] + 2_000


def read_raw(family: str, pieces: list[str]) -> None:
    parser, start = PARSERS[family](), 0
    for piece in pieces:
        parser.push(piece, start)
        start += len(piece)
        _ = parser.held
    parser.flush()


@pytest.mark.timeout(20)  # a few tenths of a second, or minutes if time is quadratic
@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("family", PARSERS)
def test_a_hundred_thousand_characters(family: str, hostile: str) -> None:
    """Such outputs are read to the end, character by character."""
    read_raw(family, list(HOSTILE[hostile](100_000)))
