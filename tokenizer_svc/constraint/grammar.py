"""Builds the decoding constraint that is sent to the generator.

Reasoning comes first if the model reasons, then tool calls in the model's own format, or text that
matches the response constraint. The generator compiles schemas and patterns;
`attribute_error_to_field` maps its errors back to the request's fields.
"""

import re
from collections.abc import Callable

from tokenizer_svc.constraint.json_schema import (
    ANY_OBJECT,
    answer_schema,
    arguments_schema,
    lenient,
    one_line,
)
from tokenizer_svc.families.choose import ModelOutputFormat
from tokenizer_svc.families.lark import ANYTHING, Marker, Plan, literal
from tokenizer_svc.families.thinking import Thinking, start_rules
from tokenizer_svc.generator.types import Constraint, ConstraintKind
from tokenizer_svc.request.types import ResponseConstraint, ResponseKind, ToolUse
from trivium.ecma_regex import to_rust
from trivium.field_errors import unsupported_parameter
from trivium.wire.errors import ServiceError

_LINE_IN_ERROR = re.compile(r"\bat (\d+)\(\d+\): ?")
_PREFIX = "The lark cannot be used: "  # callers do not know that a grammar was built
_EXCERPT = re.compile(r"\n\s+\d+ \| .*", re.DOTALL)
_UNPARSED = "with a model whose tool calls are not parsed"
# Tokens of a Lark grammar: strings, comments, patterns, names. A string or pattern without an end
# is one token too, so that its end is not searched for again from each of its characters.
_LARK_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\n])*"?|(?://|\#)[^\n]*|/(?:\\.|[^/\\\n])+/?|(?P<name>[A-Za-z_][\w-]*)'
)
_LARK_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_][\w-]*)(?:\[[^\]\n]*\])?(?:\.-?\d+)?[ \t]*:", re.M)


def build_constraint(
    response: ResponseConstraint | None,
    tool_use: ToolUse,
    output: ModelOutputFormat,
    thinking: Thinking,
    control_id: Callable[[str], int | None],
) -> Constraint | None:
    """The constraint on an answer; None if any text is allowed.

    `control_id` maps the text of a control token to its id.
    """
    if output.tools is None:  # calls are text, in whatever format the model writes them
        if tool_use.forced or tool_use.restricted:
            raise unsupported_parameter("tool_choice", _UNPARSED)
        tool_use = ToolUse()
    if response is None and not tool_use.tools:
        return None
    is_prefilled = output.is_harmony and thinking is Thinking.DONE
    if not output.thinks:
        thinking = Thinking.DONE
    if is_prefilled and not tool_use.forced:  # the prompt opened the answer
        if response is not None:
            return whole_output(response)  # nothing else can follow
        # Calls could follow, also of functions that are not allowed.
        text = Constraint(ConstraintKind.LARK, f"start: {ANYTHING}\n", "tool_choice")
        return text if tool_use.restricted else None
    if not tool_use.tools and thinking is Thinking.DONE and not output.is_harmony:
        assert response is not None, "There is nothing to constrain. This is a bug."
        return whole_output(response)

    def marker(text: str) -> str:
        token_id = control_id(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    return _wrapped(response, tool_use, output, thinking, marker)


def attribute_error_to_field(error: ServiceError, constraint: Constraint | None) -> ServiceError:
    """Makes the generator's error about a constraint name the request's field it was built from."""
    if constraint is None or not (error.param or "").startswith("constraint"):
        return error
    line = _LINE_IN_ERROR.search(error.message)
    param = constraint.lines.get(int(line[1]), constraint.param) if line else constraint.param
    reason = _LINE_IN_ERROR.sub("", _EXCERPT.sub("", error.message)).removeprefix(_PREFIX).strip()
    is_schema = param.endswith(("schema", "parameters", ".json"))
    code = error.code
    if code in ("invalid_json_schema", "invalid_value"):
        code = "invalid_json_schema" if is_schema else "invalid_value"
    return ServiceError(code, f"Invalid '{param}': {reason}", param)


def whole_output(response: ResponseConstraint) -> Constraint:
    """A constraint on the entire output."""
    if response.kind is ResponseKind.REGEX:
        return Constraint(ConstraintKind.REGEX, response.definition or "", response.param)
    if response.kind is ResponseKind.GRAMMAR:
        return Constraint(ConstraintKind.LARK, response.definition or "", response.param)
    if response.kind is ResponseKind.CHOICE:
        return Constraint(ConstraintKind.LARK, f"start: {_choices(response)}\n", response.param)
    return Constraint(ConstraintKind.JSON_SCHEMA, _schema(response), response.param)


def _wrapped(
    response: ResponseConstraint | None,
    tool_use: ToolUse,
    output: ModelOutputFormat,
    thinking: Thinking,
    marker: Marker,
) -> Constraint:
    """A Lark grammar for reasoning, tool calls and text."""
    tools = output.tools
    is_free = response is None and not tool_use.forced
    lines = ["%llguidance {}", *start_rules(thinking, marker, gap=not is_free)]
    fields = {}  # the request's fields, by the grammar line built from each
    plan = Plan(
        calls=bool(tool_use.tools),
        forced=tool_use.forced,
        parallel=tool_use.parallel and not output.single_call,
        answer=response is not None,
    )
    if tools is None:
        lines.append("body: answer")
    else:
        lines.extend(tools.body_rules(plan, marker))
        for tool, index in zip(tool_use.tools, tool_use.indices, strict=True):
            schema = arguments_schema(tool.parameters, exact=tool.strict)
            schema = one_line(schema if tool.strict else lenient(schema))
            lines.append(f"call_{index}: {tools.call_rule(tool.name or '', schema, marker)}")
            fields[len(lines)] = f"tools[{index}].function.parameters"
    if tool_use.tools:
        lines.append("call: " + " | ".join(f"call_{index}" for index in tool_use.indices))
    lines.append(f"TEXT: {ANYTHING}")
    if response is not None and not tool_use.forced:
        lines.append(_answer(response))
        fields |= dict.fromkeys(
            range(len(lines), len("\n".join(lines).split("\n")) + 1), response.param
        )
    return Constraint(
        ConstraintKind.LARK,
        "\n".join(lines) + "\n",
        response.param if response is not None and not tool_use.forced else "tools",
        fields,
    )


def _answer(response: ResponseConstraint) -> str:
    """The rule `answer`, with all rules that it refers to."""
    if response.kind is ResponseKind.GRAMMAR:
        return _renamed(response.definition or "")
    if response.kind is ResponseKind.CHOICE:
        return f"answer: {_choices(response)}"
    if response.kind is ResponseKind.REGEX:
        return f"answer: /{_pattern(response.definition or '')}/"
    return f"answer: %json {one_line(_schema(response))}"


def _schema(response: ResponseConstraint) -> str:
    if response.kind is ResponseKind.JSON_OBJECT:
        return ANY_OBJECT
    if response.definition is None:
        return "true"
    schema = answer_schema(response.definition, exact=not response.lenient)
    return lenient(schema) if response.lenient else schema


def _choices(response: ResponseConstraint) -> str:
    return " | ".join(literal(choice) for choice in response.choices)


def _pattern(regex: str) -> str:
    """A regex escaped for Lark's slashes, in the syntax of Rust's regex crate."""
    escaped = re.sub(
        r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], to_rust(regex), flags=re.DOTALL
    )
    return escaped.replace("\n", r"\n").replace("\r", r"\r")


def _renamed(grammar: str) -> str:
    """The caller's grammar with `start` as `answer`, and no rule names that clash with ours."""
    own = set(_LARK_RULE.findall(grammar))

    def rename(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in own:
            return match[0]
        if name == "start":
            return "answer"
        return f"{name}_OWN" if name[0].isupper() else f"{name}_own"

    return _LARK_TOKEN.sub(rename, grammar)
