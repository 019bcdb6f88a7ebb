"""What the generator is told of the form that an answer must have.

The reasoning comes first where the model reasons, then calls in the model's own format, or the
text in the form that was asked for. Whether a schema or pattern can be compiled is the generator's
to say; `blamed` finds the field of the request that its answer is about.
"""

import re
from collections.abc import Callable

from tokenizer_svc.constraint.json_schema import ANY_OBJECT, arguments_schema, lenient, one_line
from tokenizer_svc.families.choose import OutputFormat
from tokenizer_svc.families.lark import ANYTHING, Marker, Plan, literal
from tokenizer_svc.families.thinking import Thinking, start_rules
from tokenizer_svc.generator.types import Constraint, ConstraintKind
from tokenizer_svc.request.types import Form, OutputForm, ToolUse
from trivium.ecma_regex import to_rust
from trivium.wire.errors import ServiceError

_PLACE = re.compile(r"\bat (\d+)\(\d+\): ?")
_PREFIX = "The lark cannot be used: "  # nobody but us knows that there was a grammar
_EXCERPT = re.compile(r"\n\s+\d+ \| .*", re.DOTALL)
# Tokens of a Lark grammar: strings, comments, patterns, names.
_LARK_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\n])*"|(?://|\#)[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<name>[A-Za-z_][\w-]*)'
)
_LARK_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_][\w-]*)(?:\[[^\]\n]*\])?(?:\.-?\d+)?[ \t]*:", re.M)


def constraint(
    form: OutputForm | None,
    use: ToolUse,
    output: OutputFormat,
    thinking: Thinking,
    control_id: Callable[[str], int | None],
) -> Constraint | None:
    """The constraint on an answer, if there is any. `control_id` knows control tokens by text."""
    if form is None and not use.tools:
        return None
    begun = output.is_harmony and thinking is Thinking.DONE
    if not output.thinks:
        thinking = Thinking.DONE
    if begun and form is not None and not use.forced:
        return bare(form)  # the text of the answer was begun, and nothing else can follow
    if begun and not use.forced:
        return None
    if not use.tools and thinking is Thinking.DONE and not output.is_harmony:
        assert form is not None, "There is nothing to constrain. This is a bug."
        return bare(form)

    def marker(text: str) -> str:
        token_id = control_id(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    return _wrapped(form, use, output, thinking, marker)


def blamed(error: ServiceError, constraint: Constraint | None) -> ServiceError:
    """The generator's error as one about the field of the request that is to blame."""
    if constraint is None or not (error.param or "").startswith("constraint"):
        return error
    place = _PLACE.search(error.message)
    param = constraint.lines.get(int(place[1]), constraint.param) if place else constraint.param
    reason = _PLACE.sub("", _EXCERPT.sub("", error.message)).removeprefix(_PREFIX).strip()
    is_schema = param.endswith(("schema", "parameters", ".json"))
    code = error.code
    if code in ("invalid_json_schema", "invalid_value"):
        code = "invalid_json_schema" if is_schema else "invalid_value"
    return ServiceError(code, f"Invalid '{param}': {reason}", param)


def bare(form: OutputForm) -> Constraint:
    """A constraint on the whole of the output."""
    if form.form is Form.REGEX:
        return Constraint(ConstraintKind.REGEX, form.definition or "", form.param)
    if form.form is Form.GRAMMAR:
        return Constraint(ConstraintKind.LARK, form.definition or "", form.param)
    if form.form is Form.CHOICE:
        return Constraint(ConstraintKind.LARK, f"start: {_choices(form)}\n", form.param)
    return Constraint(ConstraintKind.JSON_SCHEMA, _schema(form), form.param)


def _wrapped(
    form: OutputForm | None,
    use: ToolUse,
    output: OutputFormat,
    thinking: Thinking,
    marker: Marker,
) -> Constraint:
    """A grammar of reasoning, calls and text."""
    tools = output.tools
    free = form is None and not use.forced
    lines = ["%llguidance {}", *start_rules(thinking, marker, gap=not free)]
    places = {}
    parallel = use.parallel and not output.single_call
    plan = Plan(
        calls=bool(use.tools), forced=use.forced, parallel=parallel, answer=form is not None
    )
    if tools is None:
        lines.append("body: answer")
    else:
        lines.extend(tools.body_rules(plan, marker))
        for tool, place in zip(use.tools, use.places, strict=True):
            schema = arguments_schema(tool.parameters)
            schema = one_line(schema if tool.strict else lenient(schema))
            lines.append(f"call_{place}: {tools.call_rule(tool.name or '', schema, marker)}")
            places[len(lines)] = f"tools[{place}].function.parameters"
    if use.tools:
        lines.append("call: " + " | ".join(f"call_{place}" for place in use.places))
    lines.append(f"TEXT: {ANYTHING}")
    if form is not None and not use.forced:
        lines.append(_answer(form))
        places |= dict.fromkeys(
            range(len(lines), len("\n".join(lines).split("\n")) + 1), form.param
        )
    return Constraint(
        ConstraintKind.LARK,
        "\n".join(lines) + "\n",
        form.param if form is not None and not use.forced else "tools",
        places,
    )


def _answer(form: OutputForm) -> str:
    """The rule `answer`, and all that it needs."""
    if form.form is Form.GRAMMAR:
        return _renamed(form.definition or "")
    if form.form is Form.CHOICE:
        return f"answer: {_choices(form)}"
    if form.form is Form.REGEX:
        return f"answer: /{_pattern(form.definition or '')}/"
    return f"answer: %json {one_line(_schema(form))}"


def _schema(form: OutputForm) -> str:
    if form.form is Form.JSON_OBJECT:
        return ANY_OBJECT
    if form.definition is None:
        return "true"
    return lenient(form.definition) if form.lenient else form.definition


def _choices(form: OutputForm) -> str:
    return " | ".join(literal(choice) for choice in form.choices)


def _pattern(regex: str) -> str:
    """A pattern as it stands between slashes, where patterns are Rust's."""
    escaped = re.sub(
        r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], to_rust(regex), flags=re.DOTALL
    )
    return escaped.replace("\n", r"\n").replace("\r", r"\r")


def _renamed(grammar: str) -> str:
    """A grammar of the caller's with its `start` as `answer`, and names that clash with none."""
    own = set(_LARK_RULE.findall(grammar))

    def rename(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in own:
            return match[0]
        if name == "start":
            return "answer"
        return f"{name}_OWN" if name[0].isupper() else f"{name}_own"

    return _LARK_TOKEN.sub(rename, grammar)
