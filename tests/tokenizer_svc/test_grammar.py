"""Constraints as compiled by llguidance: which answers they accept, and how parsers read them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as Library

from tests.tokenizer_svc import sample_templates as templates
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.test_families import Calls, read
from tokenizer_svc.constraint.grammar import attribute_error_to_field, build_constraint
from tokenizer_svc.families.choose import ModelOutputFormat, choose
from tokenizer_svc.families.thinking import Thinking
from tokenizer_svc.generator.types import Constraint, ConstraintKind
from tokenizer_svc.request.types import ResponseConstraint, ResponseKind, Tool, ToolUse
from tokenizer_svc.tokenizer import Tokenizer
from trivium.wire.errors import ServiceError

SPECIAL = (
    *("<|endoftext|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *templates.HARMONY_TOKENS[1:],
)
PLAIN = byte_level(SPECIAL)
MARKED = byte_level(SPECIAL, templates.QWEN_PLAIN_TOKENS)
LIBRARIES = {text: Library.from_str(text) for text in (PLAIN, MARKED)}
TABLES = {text: LLTokenizer(text, eos_token=1) for text in (PLAIN, MARKED)}

HERMES = choose(templates.QWEN25)
QWEN3 = choose(templates.QWEN3)
LLAMA3 = choose(templates.LLAMA31)
MISTRAL = choose(templates.MISTRAL)
NAMED = choose("[TOOL_CALLS] [ARGS]")
HARMONY = choose(templates.HARMONY)
FORMATS = {
    "hermes": HERMES,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "named": NAMED,
    "harmony": HARMONY,
}

ADD = Tool("add", None, '{"properties": {"a": {"type": "integer"}}, "required": ["a"]}')
NOW = Tool("now")
BOTH = ToolUse((ADD, NOW), (0, 1))
FORCED = ToolUse((ADD, NOW), (0, 1), forced=True)
ONE = ToolUse((ADD, NOW), (0, 1), forced=True, parallel=False)
JSON = ResponseConstraint(
    ResponseKind.JSON_SCHEMA,
    "response_format.json_schema.schema",
    definition='{"type": "object",\n "properties": {"q": {"const": "a\u2028// b"}}}',
)


def made(
    output: ModelOutputFormat,
    use: ToolUse = BOTH,
    form: ResponseConstraint | None = None,
    thinking: Thinking = Thinking.POSSIBLE,
    tokens: str = PLAIN,
) -> Constraint:
    made = build_constraint(form, use, output, thinking, Tokenizer(tokens).marker_id)
    assert made is not None
    return made


def compiled(made: Constraint, tokens: str = PLAIN) -> LLMatcher:
    grammars: dict[ConstraintKind, Callable[[str], str]] = {
        ConstraintKind.LARK: LLMatcher.grammar_from_lark,
        ConstraintKind.REGEX: LLMatcher.grammar_from_regex,
        ConstraintKind.JSON_SCHEMA: LLMatcher.grammar_from_json_schema,
    }
    matcher = LLMatcher(TABLES[tokens], grammars[made.kind](made.text))
    assert not matcher.get_error(), matcher.get_error()
    return matcher


def allows(made: Constraint, text: str, tokens: str = PLAIN) -> bool:
    """Whether the whole text is accepted as an answer."""
    matcher = compiled(made, tokens)
    token_ids = LIBRARIES[tokens].encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


CALLS: dict[str, tuple[str, str]] = {
    "hermes": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
        '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "mistral": (
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}',
        ', {"name": "now", "arguments": {}}',
    ),
    "named": ('[TOOL_CALLS]add[ARGS]{"a": 1}', "[TOOL_CALLS]now[ARGS]{}"),
    "llama3": ('{"name": "add", "parameters": {"a": 1}}', '; {"name": "now", "parameters": {}}'),
    "harmony": (
        '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}',
        "",
    ),
}
CALLS["qwen3"] = CALLS["hermes"]


def call(family: str) -> str:
    return CALLS[family][0] + ("]" if family == "mistral" else "")


def calls(family: str) -> str:
    return "".join(CALLS[family]) + ("]" if family == "mistral" else "")


def parsed(family: str, text: str) -> tuple[str, str, Calls]:
    parser = FORMATS[family].parser(BOTH.names, Thinking.POSSIBLE)
    return read(parser, [text])


@pytest.mark.parametrize("family", FORMATS)
def test_a_forced_call(family: str) -> None:
    """A single call is accepted and text is not; the parser finds the call."""
    for use in (FORCED, ONE):
        assert allows(made(FORMATS[family], use), call(family))
        assert not allows(made(FORMATS[family], use), "Hello")
        assert not allows(made(FORMATS[family], use), "")
    assert ("", "", [("add", '{"a": 1}')]) == parsed(family, call(family))


@pytest.mark.parametrize("family", ["hermes", "qwen3", "mistral", "named"])
def test_several_forced_calls(family: str) -> None:
    """Several calls are accepted only if parallel calls are allowed."""
    expected = ("", "", [("add", '{"a": 1}'), ("now", "{}")])

    assert allows(made(FORMATS[family], FORCED), calls(family))
    assert not allows(made(FORMATS[family], ONE), calls(family))
    assert expected == parsed(family, calls(family))


def test_a_space_may_follow_mistrals_marker() -> None:
    """Tokenizers of Mistral's older models have it."""
    spaced = call("mistral").replace("]", "] ", 1)
    for use in (BOTH, FORCED, ONE):
        assert allows(made(MISTRAL, use), spaced)
    assert ("", "", [("add", '{"a": 1}')]) == parsed("mistral", spaced)


def test_one_call_if_the_template_refuses_several() -> None:
    """Llama 3.1's template refuses several calls; another template of the same format gets them."""
    other = choose(templates.LLAMA31.replace("only supports single", "supports"))

    assert LLAMA3.single_call
    assert not allows(made(LLAMA3, FORCED), calls("llama3"))
    assert allows(made(other, FORCED), calls("llama3"))


@pytest.mark.parametrize("family", FORMATS)
def test_arguments_fit_the_schema(family: str) -> None:
    """They fit the called function's schema, and no other function can be called."""
    for use in (BOTH, FORCED):
        assert not allows(made(FORMATS[family], use), call(family).replace("1", '"1"'))
        assert not allows(made(FORMATS[family], use), call(family).replace("add", "sub"))


@pytest.mark.parametrize("family", ["hermes", "qwen3", "mistral", "named", "llama3"])
def test_tool_choice_auto(family: str) -> None:
    """Text, a call, or both are accepted; what looks like a call must be a valid one."""
    chosen = made(FORMATS[family])

    assert allows(chosen, "Hello <tool> [TOOL] there {")
    assert allows(chosen, "")
    assert allows(chosen, call(family))
    if family != "llama3":
        assert allows(chosen, "Let me see." + call(family))
        assert allows(chosen, "Let me see." + calls(family))
        assert not allows(chosen, call(family)[:20])
    else:
        assert not allows(chosen, '{"city": "x"}')


@pytest.mark.parametrize("family", ["hermes", "qwen3", "mistral", "named"])
def test_tool_choice_auto_without_parallel_calls(family: str) -> None:
    """Nothing may follow the call if parallel calls are not allowed."""
    chosen = made(FORMATS[family], ToolUse((ADD, NOW), (0, 1), parallel=False))

    assert allows(chosen, "Hello")
    assert allows(chosen, "Hello" + call(family))
    assert not allows(chosen, calls(family))


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("forced", [True, False])
def test_only_allowed_tools_can_be_called(family: str, forced: bool) -> None:
    """A call of another function is no answer; text is one unless a call is required."""
    add, now = ToolUse((ADD,), (0,), forced), ToolUse((NOW,), (1,), forced)
    final = "<|channel|>final<|message|>" if family == "harmony" else ""

    assert allows(made(FORMATS[family], add), call(family))
    assert not allows(made(FORMATS[family], now), call(family))
    assert forced != allows(made(FORMATS[family], now), f"{final}Hello")


def test_an_answer_that_harmony_continues_has_only_allowed_calls() -> None:
    """After text that the prompt has begun there is only more text, as any call could follow it."""
    use = ToolUse((ADD,), (0,), restricted=True)
    continued = made(HARMONY, use, thinking=Thinking.DONE)

    assert allows(continued, " and so on.")
    assert not allows(continued, f"<|end|><|start|>assistant{call('harmony')}")


def test_tool_choice_auto_in_harmony() -> None:
    """Harmony allows reasoning, then a remark, then a call or the answer."""
    chosen = made(HARMONY)
    thought = "<|channel|>analysis<|message|>Hm {.<|end|><|start|>assistant"
    remark = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>Hi."

    assert allows(chosen, thought + final)
    assert allows(chosen, final)
    assert allows(chosen, thought + call("harmony"))
    assert allows(chosen, thought + remark + call("harmony"))
    assert not allows(made(HARMONY, FORCED), thought + final)
    assert allows(made(HARMONY, FORCED), thought + call("harmony"))
    assert ("Hm {.", "", [("add", '{"a": 1}')]) == parsed("harmony", thought + call("harmony"))


@pytest.mark.parametrize("tokens", [PLAIN, MARKED], ids=["letters", "tokens"])
@pytest.mark.parametrize("forced", [True, False])
def test_reasoning_comes_before_calls(tokens: str, forced: bool) -> None:
    """Reasoning is unconstrained even if it mentions calls; markers may be single tokens."""
    use = FORCED if forced else BOTH
    thought = "<think>\nWell, <tool_cal {\n</think>"
    possible = made(QWEN3, use, tokens=tokens)
    opened = made(QWEN3, use, thinking=Thinking.OPENED, tokens=tokens)

    assert allows(possible, f"{thought}\n\n{call('qwen3')}", tokens)
    assert allows(possible, call("qwen3"), tokens)
    assert allows(opened, f"Hm.</think>\n\n{call('qwen3')}", tokens)
    assert not allows(opened, "Hm.", tokens)
    assert forced != allows(possible, f"{thought}\n\nHello", tokens)
    if tokens is PLAIN:
        assert allows(possible, f"<think>a <tool_call> b</think>{call('qwen3')}", tokens)


@pytest.mark.parametrize("tokens", [PLAIN, MARKED], ids=["letters", "tokens"])
@pytest.mark.parametrize("tool_parser", ["auto", "none"])
def test_reasoning_comes_before_json(tool_parser: str, tokens: str) -> None:
    """Reasoning is optional unless the prompt has opened it."""
    answer = '{"q": "a\u2028// b"}'
    output = choose(templates.QWEN3, tool_parser)
    possible = made(output, ToolUse(), JSON, tokens=tokens)
    opened = made(output, ToolUse(), JSON, Thinking.OPENED, tokens)
    done = made(output, ToolUse(), JSON, Thinking.DONE, tokens)

    assert allows(possible, answer, tokens)
    assert allows(possible, f"<think>\nHm.\n</think>\n\n{answer}", tokens)
    assert not allows(possible, "Hello", tokens)
    assert allows(opened, f"Hm.\n</think>\n\n{answer}", tokens)
    assert not allows(opened, answer, tokens)
    assert ConstraintKind.JSON_SCHEMA is done.kind
    assert allows(done, answer, tokens)


def test_harmony_reasons_before_json() -> None:
    """It writes JSON into the final channel; a message that was begun is continued."""
    wrapped = made(HARMONY, ToolUse(), JSON)
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"

    assert allows(wrapped, thought + '<|channel|>final<|message|>{"q": "a\u2028// b"}')
    assert not allows(wrapped, thought + "<|channel|>final<|message|>Hello")
    assert ConstraintKind.JSON_SCHEMA is made(HARMONY, ToolUse(), JSON, Thinking.DONE).kind
    assert build_constraint(None, BOTH, HARMONY, Thinking.DONE, lambda text: None) is None


@pytest.mark.parametrize("template", [templates.QWEN25, templates.QWEN3])
def test_calls_that_are_not_parsed_are_not_constrained(template: str) -> None:
    """Without a tool parser, tools are no part of the constraint; a response format is."""
    output = choose(template, "none")

    assert build_constraint(None, BOTH, output, Thinking.DONE, lambda text: None) is None
    assert allows(made(output, BOTH, JSON), '{"q": "a\u2028// b"}')
    assert not allows(made(output, BOTH, JSON), "Hello")


@pytest.mark.parametrize("family", FORMATS)
def test_json_or_calls(family: str) -> None:
    """With tools and a response format, an answer is either JSON or calls."""
    either = made(FORMATS[family], BOTH, JSON)
    final = "<|channel|>final<|message|>" if family == "harmony" else ""

    assert allows(either, final + '{"q": "a\u2028// b"}')
    assert allows(either, call(family))
    assert not allows(either, final + "Hello")


FORMS: list[tuple[ResponseConstraint, str, str]] = [
    (
        ResponseConstraint(ResponseKind.JSON_OBJECT, "response_format"),
        '{"x": [1]}',
        "[1]",
    ),
    (
        ResponseConstraint(ResponseKind.JSON_SCHEMA, "structured_outputs.json"),
        '"any"',
        "any",
    ),
    (
        ResponseConstraint(
            ResponseKind.JSON_SCHEMA,
            "structured_outputs.json",
            definition='{"type": "null"}',
        ),
        "null",
        "1",
    ),
    (
        ResponseConstraint(
            ResponseKind.REGEX, "structured_outputs.regex", definition=r"[a-c/]+\/\d\n"
        ),
        "a//1\n",
        "d",
    ),
    (
        ResponseConstraint(
            ResponseKind.CHOICE,
            "structured_outputs.choice",
            choices=('a "b"\n', "é\\🙂", "\x7f"),
        ),
        "é\\🙂",
        "é",
    ),
    (
        ResponseConstraint(
            ResponseKind.GRAMMAR,
            "structured_outputs.grammar",
            definition=(
                'start: body TEXT? // start\nbody: "start" | start2\nstart2: /body/\nTEXT: "!"'
            ),
        ),
        "body!",
        "start2",
    ),
]


@pytest.mark.parametrize(("form", "right", "wrong"), FORMS)
def test_each_kind_of_constraint(form: ResponseConstraint, right: str, wrong: str) -> None:
    """Each form works alone, after reasoning, and together with tools."""
    alone = made(HERMES, ToolUse(), form)
    reasoned = made(QWEN3, ToolUse(), form, Thinking.OPENED)
    beside = made(HERMES, BOTH, form)

    assert (True, False) == (allows(alone, right), allows(alone, wrong))
    assert allows(reasoned, f"Hm.</think>{right}")
    assert not allows(reasoned, f"Hm.</think>{wrong}")
    assert (True, False) == (allows(beside, right), allows(beside, wrong))
    assert allows(beside, call("hermes"))


def test_a_regex_is_the_same_alone_and_wrapped() -> None:
    """`\\d` means ASCII digits in either case."""
    form = ResponseConstraint(
        ResponseKind.REGEX, "structured_outputs.regex", definition=r"\d[\w-]/[^\D]"
    )
    wrapped = made(QWEN3, ToolUse(), form, Thinking.OPENED)

    assert allows(wrapped, "</think>1-/2")
    assert not allows(wrapped, "</think>٣-/2")
    assert not allows(wrapped, "</think>1é/2")


@pytest.mark.timeout(8)  # milliseconds, or half a minute if time is quadratic
@pytest.mark.parametrize("rest", ['"' + '\\"' * 30_000, "/" + "\\/" * 30_000])
def test_a_grammar_is_renamed_in_linear_time(rest: str) -> None:
    """A long string or pattern without an end stays as it is, for the generator to refuse."""
    form = ResponseConstraint(ResponseKind.GRAMMAR, "structured_outputs.grammar", f"start: {rest}")

    assert f"\nanswer: {rest}\n" in made(QWEN3, ToolUse(), form).text


def fault(made: Constraint) -> str:
    matcher = LLMatcher(TABLES[PLAIN], LLMatcher.grammar_from_lark(made.text))
    return f"The lark cannot be used: {matcher.get_error()}"


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("place", [0, 1])
def test_schema_errors_name_the_tool(family: str, place: int) -> None:
    """The generator's error names a line, and that line belongs to a tool."""
    schema = '{"type": "object", "properties": {"x": {"type": "strin"}}}'
    tools = [ADD, NOW]
    tools[place] = Tool("bad", None, schema)
    for form in (None, JSON):
        wrong = made(FORMATS[family], ToolUse(tuple(tools), (3, 5)), form)
        error = attribute_error_to_field(
            ServiceError("invalid_value", fault(wrong), "constraint"), wrong
        )

        assert ("invalid_json_schema", f"tools[{(3, 5)[place]}].function.parameters") == (
            error.code,
            error.param,
        )
        assert "Invalid type: strin" in error.message
        assert "%json" not in error.message


def test_schema_errors_name_the_response_format() -> None:
    """The response format is named even if there are tools too."""
    form = ResponseConstraint(
        ResponseKind.JSON_SCHEMA,
        "response_format.json_schema.schema",
        '{"type": "strin"}',
    )
    wrong = made(HERMES, BOTH, form)
    error = attribute_error_to_field(
        ServiceError("invalid_value", fault(wrong), "constraint"), wrong
    )

    assert ("invalid_json_schema", form.param) == (error.code, error.param)


@pytest.mark.parametrize(
    ("form", "code", "expected"),
    [
        (FORMS[3][0], "invalid_value", "invalid_value"),
        (FORMS[3][0], "invalid_json_schema", "invalid_value"),
        (FORMS[2][0], "invalid_json_schema", "invalid_json_schema"),
        (FORMS[2][0], "json_schema_too_complex", "json_schema_too_complex"),
        (FORMS[5][0], "json_schema_too_complex", "json_schema_too_complex"),
    ],
)
def test_constraint_errors_name_the_field(
    form: ResponseConstraint, code: str, expected: str
) -> None:
    """The error names the field that the constraint came from."""
    for thinking in (Thinking.DONE, Thinking.OPENED):
        constraint = made(QWEN3, ToolUse(), form, thinking)
        error = attribute_error_to_field(ServiceError(code, "It cannot.", "constraint"), constraint)

        assert (expected, form.param) == (error.code, error.param)
        assert error.message.endswith("It cannot.")


def test_other_errors_are_unchanged() -> None:
    """Errors that are not about the constraint, such as queue_full, are unchanged."""
    full = ServiceError("queue_full", "full")

    assert full is attribute_error_to_field(full, made(HERMES))
    assert full is attribute_error_to_field(full, None)


def test_plain_text_needs_no_constraint() -> None:
    """Plain text needs no constraint, even from a reasoning model."""
    for output in FORMATS.values():
        made = build_constraint(None, ToolUse(), output, Thinking.POSSIBLE, lambda text: None)
        assert made is None


# Schemas, and whether objects may have properties that they do not name.
PROPERTIES = [
    ({"properties": {"a": {"type": "integer"}}}, False),
    ({"properties": {"a": {"type": "integer"}}, "additionalProperties": True}, True),
    ({"properties": {"a": {}}, "patternProperties": {"^x": {}}}, True),
    ({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["x"]}]}, True),
    ({"allOf": [{"properties": {"a": {}}}, {"properties": {"x": {}}}]}, True),
    ({"allOf": [{"anyOf": [{"properties": {"a": {}}}]}, {"properties": {"x": {}}}]}, True),
    ({"properties": {"a": {}}, "$ref": "#/$defs/x", "$defs": {"x": {"properties": {}}}}, True),
    ({"properties": {"a": {}}, "if": {}, "then": {"properties": {"x": {}}}}, True),
    ({"properties": {"a": {}}, "dependencies": {"a": {"properties": {"x": {}}}}}, True),
    ({"required": ["a"]}, True),
    ({"maxProperties": 2}, True),
    ({"additionalProperties": True}, True),
    # Keywords inside a subschema do not open the object around it.
    (
        {
            "properties": {
                "a": {},
                "b": {"allOf": [{"properties": {"c": {}}}, {"properties": {"d": {}}}]},
            }
        },
        False,
    ),
    ({"properties": {"a": {}, "b": {"type": "object", "minProperties": 1}}}, False),
    (
        {
            "properties": {"a": {}, "b": {"$ref": "#/$defs/y", "properties": {"c": {}}}},
            "$defs": {"y": {"properties": {"d": {}}}},
        },
        False,
    ),
    ({"properties": {"a": {}}, "not": {"required": ["b"]}}, False),
    ({"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"properties": {"a": {}}}}}, False),
    ({"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, False),
]


@pytest.mark.parametrize(("schema", "wider"), PROPERTIES)
def test_undeclared_arguments_are_not_generated(schema: dict[str, Any], wider: bool) -> None:
    """Arguments that the schema does not name are not generated, unless it appears to want them."""
    tool = Tool("add", None, json.dumps(schema))
    forced = made(HERMES, ToolUse((tool,), (0,), forced=True))

    assert allows(forced, call("hermes"))
    assert wider == allows(forced, call("hermes").replace("1", '1, "x": 2'))


@pytest.mark.parametrize(("schema", "wider"), PROPERTIES)
def test_undeclared_properties_are_not_generated(schema: dict[str, Any], wider: bool) -> None:
    """The same holds for objects in answers, with and without tools."""
    definition = json.dumps({"type": "object"} | schema)
    form = ResponseConstraint(
        ResponseKind.JSON_SCHEMA, "response_format", definition=definition, lenient=True
    )

    for tool_use in (ToolUse(), BOTH):
        answer = made(HERMES, tool_use, form)
        assert allows(answer, '{"a": 1}')
        assert wider == allows(answer, '{"a": 1, "x": 2}')


_X = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
_Y = {"type": "object", "properties": {"y": {"type": "integer"}}, "required": ["y"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": _X}}, {"properties": {"a": _Y}}]},
        {"properties": {"a": _X}, "anyOf": [{"properties": {"a": _Y}}]},
        {"properties": {"a": _X}, "patternProperties": {"^a": _Y}},
        {
            "properties": {"a": _X},
            "$ref": "#/$defs/y",
            "$defs": {"y": {"properties": {"a": _Y}}},
        },
        {"allOf": [{"properties": {"a": {"$ref": "#/$defs/x"}}}, {"properties": {"a": _Y}}]}
        | {"$defs": {"x": _X}},
    ],
)
def test_a_property_in_several_schemas_satisfies_all(schema: dict[str, Any]) -> None:
    """The value satisfies all of them."""
    definition = json.dumps({"type": "object", "required": ["a"]} | schema)
    form = ResponseConstraint(ResponseKind.JSON_SCHEMA, "response_format", definition)
    answer = made(HERMES, ToolUse(), form)

    assert allows(answer, '{"a": {"x": 1, "y": 2}}')
    assert not allows(answer, '{"a": {"x": 1}}')
    assert not allows(answer, '{"a": {"y": 2}}')


@pytest.mark.parametrize("required", [5, ["a", ["b"], 3]])
@pytest.mark.parametrize("lenient", [True, False])
def test_unknown_keywords_are_not_treated_as_schemas(required: Any, lenient: bool) -> None:
    """It is not treated as a schema, however much it looks like one."""
    schema = {"type": "object", "x-form": {"properties": {"a": {}}, "required": required}}
    form = ResponseConstraint(
        ResponseKind.JSON_SCHEMA, "response_format", json.dumps(schema), lenient=lenient
    )

    assert allows(made(HERMES, ToolUse(), form), '{"a": 1}')


@pytest.mark.parametrize("lenient", [True, False])
def test_an_unsatisfiable_schema_is_refused(lenient: bool) -> None:
    """The generator's error says why."""
    form = ResponseConstraint(ResponseKind.JSON_SCHEMA, "response_format", "false", lenient=lenient)
    answer = made(HERMES, ToolUse(), form)

    assert (
        "unsatisfiable"
        in LLMatcher(TABLES[PLAIN], LLMatcher.grammar_from_json_schema(answer.text))
        .get_error()
        .lower()
    )


def test_strict_answers_have_no_undeclared_properties() -> None:
    """The same holds for `structured_outputs.json`."""
    definition = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    form = ResponseConstraint(
        ResponseKind.JSON_SCHEMA, "structured_outputs.json", definition=definition
    )
    answer = made(HERMES, ToolUse(), form)

    assert allows(answer, '{"a": 1}')
    assert not allows(answer, '{"a": 1, "x": 2}')


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("members", "closes"),
    [
        ([A, B], False),  # {"a": 1} fits both: neither may be closed
        ([A, {"$ref": "#/$defs/missing"}], False),
        ([A, {"type": "integer"}, {"type": "number"}], False),
        ([A, {"type": "null"}, {"type": "array"}], True),
        (
            [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "a": {}},
                    "required": ["kind"],
                }
                for kind in ("cat", "dog")
            ],
            True,
        ),
    ],
)
def test_one_of_still_means_exactly_one(members: list[Any], closes: bool) -> None:
    """Closing schemas may make overlapping ones distinct; where the schema must be exact, in
    answers and strict tools, they are then left open."""
    schema = json.dumps({"type": "object", "properties": {"u": {"oneOf": members}}})
    form = ResponseConstraint(
        ResponseKind.JSON_SCHEMA, "response_format", definition=schema, lenient=False
    )
    tool = Tool("add", None, schema, strict=True)
    vague = Tool("add", None, schema)

    for constraint in (
        made(HERMES, ToolUse(), form),
        made(HERMES, ToolUse((tool,), (0,), forced=True)),
    ):
        assert closes == ('"additionalProperties": false' in constraint.text)
    lenient = made(HERMES, ToolUse((vague,), (0,), forced=True))
    assert '"additionalProperties": false' in lenient.text


def test_an_object_schema_without_properties_allows_any() -> None:
    """A schema that lists no properties allows any."""
    form = ResponseConstraint(ResponseKind.JSON_SCHEMA, "response_format", '{"type": "object"}')

    assert allows(made(HERMES, ToolUse(), form), '{"x": {"y": 2}}')


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        "{}",
        '{"type": "object"}',
        '{"type": "object", "properties": {}}',
        '{"type": "object", "description": "none", "title": "x"}',
    ],
)
@pytest.mark.parametrize("family", FORMATS)
def test_a_function_without_parameters_gets_an_empty_object(
    family: str, parameters: str | None
) -> None:
    """However its parameters express that there are none, its arguments are an empty object."""
    tool = Tool("add", None, parameters)
    forced = made(FORMATS[family], ToolUse((tool,), (0,), forced=True))

    assert allows(forced, call(family).replace('{"a": 1}', "{}"))
    assert not allows(forced, call(family))


def test_a_nested_object_without_properties_allows_any() -> None:
    """A nested object is data, where JSON Schema means what it says."""
    tool = Tool("add", None, '{"properties": {"a": {"type": "object"}}}')
    forced = made(HERMES, ToolUse((tool,), (0,), forced=True))

    assert allows(forced, call("hermes").replace("1", '{"any": [1]}'))


def test_a_required_undeclared_property_can_be_generated() -> None:
    """It may have any value, and no other fields are generated."""
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a", "b"]}
    forced = made(HERMES, ToolUse((Tool("add", None, json.dumps(schema)),), (0,), forced=True))

    assert allows(forced, call("hermes").replace("1", '1, "b": [2]'))
    assert not allows(forced, call("hermes"))
    assert not allows(forced, call("hermes").replace("1", '1, "b": 2, "c": 3'))


@pytest.mark.parametrize("family", FORMATS)
def test_only_strict_schemas_are_enforced_exactly(family: str) -> None:
    """Every other schema is marked lenient, so that the generator may drop what it cannot enforce;
    a caller cannot mark a strict schema so."""
    schema = '{"properties": {"a": {"x-guidance": 1}}, "x-guidance": {"lenient": true}}'
    for strict in (True, False):
        tools = (Tool("add", None, schema, strict=strict),)
        text = made(FORMATS[family], ToolUse(tools, (0,), forced=True)).text
        [schema_text] = [
            line.partition("%json ")[2] for line in text.split("\n") if "%json" in line
        ]
        told, _ = json.JSONDecoder().raw_decode(schema_text)

        assert (None if strict else {"lenient": True}) == told.get("x-guidance")


def test_constants_in_schemas_are_unchanged() -> None:
    """A constant that looks like a schema is unchanged."""
    constant = {"properties": {"b": 1}}
    schema = {"properties": {"a": {"const": constant}}, "required": ["a"]}
    forced = made(HERMES, ToolUse((Tool("add", None, json.dumps(schema)),), (0,), forced=True))

    assert allows(forced, call("hermes").replace("1", json.dumps(constant)))


@pytest.mark.parametrize("family", FORMATS)
def test_recursive_schemas(family: str) -> None:
    """References are resolved in every format."""
    tree = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#"}}}
    schema = json.dumps(tree | {"$defs": {"n": {"type": "integer"}}, "required": ["a"]})
    forced = made(FORMATS[family], ToolUse((Tool("add", None, schema),), (0,), forced=True))

    assert allows(forced, call(family))
    assert allows(forced, call(family).replace("1", '1, "b": {"a": 2}'))
    assert not allows(forced, call(family).replace("1", '1, "b": {"a": "2"}'))
