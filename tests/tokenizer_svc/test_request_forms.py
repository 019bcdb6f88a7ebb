"""Checks of response formats, tools, reasoning and stop conditions: code and OpenAI's field."""

from typing import Any

import grpc
import pytest

from tests.completion_requests import options
from tests.tokenizer_svc.conftest import Stage, user
from tests.tokenizer_svc.scripted_generator import code_of, fails_after
from trivium.chat.v1 import chat_pb2, completion_pb2
from trivium.tokenizer.v1 import tokenizer_pb2
from trivium.wire.errors import ServiceError

SCHEMA, COMPLEX = "invalid_json_schema", "json_schema_too_complex"
COMBINATION, MISSING = "invalid_parameter_combination", "missing_required_parameter"
INVALID, TOO_LONG = "invalid_value", "string_above_max_length"

REQUIRED = {"mode": chat_pb2.TOOL_CHOICE_MODE_REQUIRED}
NAMED = {"mode": chat_pb2.TOOL_CHOICE_MODE_FUNCTION, "function_name": "f"}
ALLOWED = "tool_choice.allowed_tools"
ASSISTANT = chat_pb2.ChatMessage(
    role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.ContentPart(text="Once")]
)


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"function": {"name": name} | function}


def allowed(*names: str, **choice: Any) -> dict[str, Any]:
    """A request with the tools f and g, and a choice that allows these."""
    choice |= {"allowed_tools": {"function_names": names}}
    return {"tools": [tool(), tool("g")], "tool_choice": choice}


def json_schema(schema: str, name: str = "n", **more: Any) -> dict[str, Any]:
    return {"response_format": {"json_schema": {"name": name, "schema": schema} | more}}


def parameters(schema: str) -> dict[str, Any]:
    return {"tools": [tool("g"), tool(parameters=schema)]}


NAME = "response_format.json_schema.name"
PLACE = "response_format.json_schema.schema"
PARAMETERS = "tools[1].function.parameters"

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {}}, INVALID, "response_format"),
    (json_schema("{}", name=""), MISSING, NAME),
    (json_schema("{}", name="a b"), INVALID, NAME),
    (json_schema("{}", name="a" * 65), TOO_LONG, NAME),
    (json_schema("{"), SCHEMA, PLACE),
    (json_schema("[]"), SCHEMA, PLACE),
    (json_schema('{"const": NaN}'), SCHEMA, PLACE),
    (json_schema('{"not":' * 100_000 + "}" * 100_000), COMPLEX, PLACE),
    (json_schema('{"not":' * 128 + "{}" + "}" * 128), COMPLEX, PLACE),
    (json_schema('{"not":' * 10_000 + "1" + "}" * 10_000), COMPLEX, PLACE),
    (json_schema('{"type": "float"}'), SCHEMA, PLACE),
    (json_schema('{"properties": {"a": {"anyOf": [{}, {"minLength": -1}]}}}'), SCHEMA, PLACE),
    (json_schema('{"items": [{"required": true}]}'), SCHEMA, PLACE),
    (json_schema('{"$defs": {"a": 1}}'), SCHEMA, PLACE),
    (json_schema('{"multipleOf": 0}'), SCHEMA, PLACE),
    (parameters('{"properties": ["a"]}'), SCHEMA, PARAMETERS),
    (parameters('{"properties": {"a": {"type": ["string", "any"]}}}'), SCHEMA, PARAMETERS),
    ({"structured_outputs": {"json": '{"enum": 1}'}}, SCHEMA, "structured_outputs.json"),
    *(
        ({"structured_outputs": {"grammar": grammar}}, INVALID, "structured_outputs.grammar")
        for grammar in ("a ::= b", "root ::= a", 'root ::= "a', "root ::= [b-a]", "root ::= (a")
    ),
    ({"structured_outputs": {}}, INVALID, "structured_outputs"),
    ({"structured_outputs": {"json": "nothing"}}, SCHEMA, "structured_outputs.json"),
    ({"structured_outputs": {"regex": ""}}, MISSING, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a" * 65_537}}, TOO_LONG, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": ""}}, MISSING, "structured_outputs.grammar"),
    ({"structured_outputs": {"choice": {}}}, "empty_array", "structured_outputs.choice"),
    (
        {"structured_outputs": {"choice": {"choices": ["a", ""]}}},
        INVALID,
        "structured_outputs.choice[1]",
    ),
    (
        {"structured_outputs": {"choice": {"choices": ["a"] * 1025}}},
        "array_above_max_length",
        "structured_outputs.choice",
    ),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"json_object": {}}},
        COMBINATION,
        "structured_outputs",
    ),
    (
        {"structured_outputs": {"regex": "a"}, "tools": [tool()], "tool_choice": REQUIRED},
        COMBINATION,
        "structured_outputs",
    ),
    ({"tools": [tool()] * 129}, "array_above_max_length", "tools"),
    ({"tools": [{}]}, INVALID, "tools[0].type"),
    ({"tools": [tool(""), tool()]}, MISSING, "tools[0].function.name"),
    ({"tools": [tool(), tool("a.b")]}, INVALID, "tools[1].function.name"),
    ({"tools": [tool("ä")]}, INVALID, "tools[0].function.name"),
    ({"tools": [tool("a" * 65)]}, TOO_LONG, "tools[0].function.name"),
    ({"tools": [tool(), tool()]}, INVALID, "tools[1].function.name"),
    (parameters("{"), SCHEMA, PARAMETERS),
    (parameters("true"), SCHEMA, PARAMETERS),
    (parameters('{"type": "string"}'), SCHEMA, PARAMETERS),
    (parameters('{"type": "object", "title": "' + "x" * 262_144 + '"}'), COMPLEX, PARAMETERS),
    ({"tool_choice": REQUIRED}, COMBINATION, "tool_choice"),
    ({"tool_choice": NAMED}, COMBINATION, "tool_choice"),
    ({"tools": [tool("g")], "tool_choice": NAMED}, INVALID, "tool_choice.function.name"),
    (allowed(), "empty_array", f"{ALLOWED}.tools"),
    (allowed(*["f"] * 129), "array_above_max_length", f"{ALLOWED}.tools"),
    (allowed("g", "h"), INVALID, f"{ALLOWED}.tools[1].function.name"),
    (allowed("g", "f", "g"), INVALID, f"{ALLOWED}.tools[2].function.name"),
    (allowed("g", mode=chat_pb2.TOOL_CHOICE_MODE_NONE), COMBINATION, ALLOWED),
    (allowed("g", **NAMED), COMBINATION, ALLOWED),
    (allowed("g") | {"tools": []}, COMBINATION, "tool_choice"),
    (
        {"tools": [tool("g")], "tool_choice": {"mode": chat_pb2.TOOL_CHOICE_MODE_FUNCTION}},
        MISSING,
        "tool_choice.function.name",
    ),
    *(
        (
            {"tools": [tool()], "tool_choice": {"mode": mode, "function_name": "f"}},
            COMBINATION,
            "tool_choice.function.name",
        )
        for mode in (
            chat_pb2.TOOL_CHOICE_MODE_UNSPECIFIED,
            chat_pb2.TOOL_CHOICE_MODE_NONE,
            chat_pb2.TOOL_CHOICE_MODE_AUTO,
            chat_pb2.TOOL_CHOICE_MODE_REQUIRED,
        )
    ),
    ({"tools": [tool()], "tool_choice": {"mode": 17}}, INVALID, "tool_choice"),
    ({"reasoning_effort": "extreme"}, INVALID, "reasoning_effort"),
    ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
    ({"chat_template_kwargs": {"thinking": "{"}}, INVALID, "chat_template_kwargs.thinking"),
    (
        {"chat_template_kwargs": {"thinking": "[" * 500 + "]" * 500}},
        INVALID,
        "chat_template_kwargs.thinking",
    ),
    (
        {"chat_template_kwargs": {"tools": "[]"}},
        "unsupported_parameter",
        "chat_template_kwargs.tools",
    ),
    ({"continue_final_message": True}, COMBINATION, "continue_final_message"),
    (
        {
            "continue_final_message": True,
            "add_generation_prompt": True,
            "messages": [user("x"), ASSISTANT],
        },
        COMBINATION,
        "continue_final_message",
    ),
    ({"stop_token_ids": [3, 512]}, INVALID, "stop_token_ids[1]"),
    ({"stop_token_ids": [-1]}, INVALID, "stop_token_ids[0]"),
    ({"stop_token_ids": [3] * 65}, "array_above_max_length", "stop_token_ids"),
    ({"bad_words": ["a", ""]}, INVALID, "bad_words[1]"),
    ({"bad_words": ["a", " \n "]}, INVALID, "bad_words[1]"),
    ({"bad_words": ["a" * 257]}, "string_above_max_length", "bad_words[0]"),
    ({"bad_words": ["a"] * 129}, "array_above_max_length", "bad_words"),
    ({"allowed_token_ids": [3, 512]}, INVALID, "allowed_token_ids[1]"),
    ({"allowed_token_ids": [-1]}, INVALID, "allowed_token_ids[0]"),
    ({"allowed_token_ids": [3] * 16_385}, "array_above_max_length", "allowed_token_ids"),
]


@pytest.mark.parametrize(("fields", "code", "param"), WRONG)
async def test_invalid_constraints(
    stage: Stage, fields: dict[str, Any], code: str, param: str
) -> None:
    """Each is refused with its code and field, and the generator is not called."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.chat.CreateChatCompletion(stage.request(**fields))

    assert (code, param) == code_of(refused.value)
    assert grpc.StatusCode.INVALID_ARGUMENT is refused.value.code()
    assert [] == stage.generator.calls


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [tool("a b")]}, INVALID, "tools[0].function.name"),
        ({"continue_final_message": True}, COMBINATION, "continue_final_message"),
        (
            {"chat_template_kwargs": {"x": "1"}},
            "unsupported_parameter",
            "chat_template_kwargs.x",
        ),
    ],
)
async def test_rendering_is_checked_too(
    stage: Stage, fields: dict[str, Any], code: str, param: str
) -> None:
    """RenderChat checks a conversation like a completion does."""
    request = tokenizer_pb2.RenderChatRequest(model="tiny", messages=[user("x")], **fields)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.tokenizer.RenderChat(request)

    assert (code, param) == code_of(refused.value)


Prompts = list[completion_pb2.Prompt]


def text_prompt(text: str) -> completion_pb2.Prompt:
    return completion_pb2.Prompt(text=text)


def ids_prompt(*token_ids: int) -> completion_pb2.Prompt:
    return completion_pb2.Prompt(token_ids=completion_pb2.TokenIds(ids=token_ids))


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompts": []}, "empty_array", "prompt"),
        ({"prompts": [text_prompt("x")] * 129}, "array_above_max_length", "prompt"),
        ({"prompts": [completion_pb2.Prompt()]}, MISSING, "prompt"),
        ({"prompts": [text_prompt("")]}, INVALID, "prompt"),
        ({"prompts": [text_prompt("x"), ids_prompt()]}, "empty_array", "prompt[1]"),
        ({"prompts": [ids_prompt(3, 512)]}, INVALID, "prompt[1]"),
        ({"prompts": [text_prompt("x"), ids_prompt(-1)]}, INVALID, "prompt[1][0]"),
        ({"prompts": [text_prompt("x " * 300)]}, "context_length_exceeded", "prompt"),
        ({"prompts": [ids_prompt(*[3] * 256)]}, "context_length_exceeded", "prompt"),
        ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
        ({"options": options(temperature=3.0)}, "decimal_above_max_value", "temperature"),
        ({"options": options(n=129)}, "integer_above_max_value", "n"),
        ({"model": "other"}, "model_not_found", "model"),
        ({"options": {"structured_outputs": {"json": "{"}}}, SCHEMA, "structured_outputs.json"),
    ],
)
async def test_invalid_completions(
    stage: Stage, fields: dict[str, Any], code: str, param: str
) -> None:
    """Plain completions are checked too."""
    good: dict[str, Any] = {"model": "tiny", "prompts": [text_prompt("x")]}
    request = completion_pb2.CreateCompletionRequest(**good | fields)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.completions.CreateCompletion(request)

    assert (code, param) == code_of(refused.value)
    assert [] == stage.generator.calls


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        (json_schema('{"enum": []}'), "json_schema", PLACE),
        ({"structured_outputs": {"regex": "("}}, "regex", "structured_outputs.regex"),
        ({"response_format": {"json_object": {}}}, "json_schema", "response_format"),
    ],
)
async def test_the_generators_refusal_of_a_constraint(
    stage: Stage, fields: dict[str, Any], kind: str, param: str
) -> None:
    """The error names the caller's field."""
    fault = ServiceError("json_schema_too_complex", "The constraint is too complex.", "constraint")
    stage.generator.script = fails_after([], fault)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.chat.CreateChatCompletion(stage.request(**fields))

    assert ("json_schema_too_complex", param) == code_of(refused.value)
    assert kind == stage.generator.calls[0].start.constraint.WhichOneof("kind")


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"text": {}}}, None, ""),
        ({"structured_outputs": {"json_object": False}}, None, ""),
        ({"tools": [tool()], "tool_choice": {"mode": chat_pb2.TOOL_CHOICE_MODE_NONE}}, None, ""),
        ({"tool_choice": {"mode": chat_pb2.TOOL_CHOICE_MODE_AUTO}}, None, ""),
        ({"parallel_tool_calls": False}, None, ""),
        (
            json_schema('{"type":\n"null"}'),
            "json_schema",
            '{"type": "null", "x-guidance": {"lenient": true}}',
        ),
        (json_schema("true"), "json_schema", "true"),
        (json_schema('{"type":\n"null"}', strict=True), "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"json": '{"not": {}}'}}, "json_schema", '{"not": {}}'),
        (
            {"structured_outputs": {"grammar": 'root ::= "a"\n  | [b-d]+ # x'}},
            "lark",
            'start: "a" | (/[\\u{62}-\\u{64}]/)+\n',
        ),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "a/b"}}, "regex", "a/b"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"choice": {"choices": ["a"]}}}, "lark", 'start: "a"\n'),
    ],
)
async def test_the_generator_gets_the_constraint(
    stage: Stage, fields: dict[str, Any], kind: str | None, text: str
) -> None:
    """It is what the caller meant: lenient unless strict, GBNF as Lark, or nothing."""
    stage.generator.script = fails_after([], ServiceError("queue_full", "full"))
    with pytest.raises(grpc.aio.AioRpcError):
        await stage.chat.CreateChatCompletion(stage.request(**fields))
    start = stage.generator.calls[0].start

    assert kind == start.constraint.WhichOneof("kind")
    assert text == ("" if kind is None else getattr(start.constraint, kind))
