"""The tools of a request, and which of them are to be called."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from rest_facade.requests.field import Name, ObjectText, Strict, field_error, reject_unsupported
from trivium.field_errors import contradiction
from trivium.limits import MAX_TOOLS
from trivium.wire.errors import ServiceError


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Name = Field(description="Letters, digits, underscores and hyphens.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: ObjectText | None = Field(
        None, description="JSON Schema of its arguments. Default: no arguments."
    )
    strict: bool | None = Field(
        None,
        description="Whether the schema is either enforced exactly or refused; otherwise it is "
        "enforced as far as possible. Default false.",
    )


class ToolParam(Strict):
    """A tool that the model may use."""

    # OpenAI requires it; vLLM does not, and Hugging Face's client leaves it out of choices.
    type: Annotated[Literal["function"], reject_unsupported("custom")] = "function"
    function: FunctionDefinition


Tools = Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionName(Strict):
    """A function by its name."""

    name: Name


def _only_function(kind: str) -> str:
    if kind in ("allowed_tools", "custom"):
        raise field_error("unsupported_value", f"Tool choices of type '{kind}' are not supported.")
    if kind != "function":
        raise field_error(
            "invalid_value", f"Invalid value: '{kind[:64]}'. Supported values are: 'function'."
        )
    return kind


class ToolChoiceParam(Strict):
    """The function to call; the modes 'none', 'auto' and 'required' are plain strings."""

    type: Annotated[str, AfterValidator(_only_function)] = Field(
        "function", json_schema_extra={"enum": ["function"]}
    )
    function: FunctionName


_Mode = Literal["none", "auto", "required"]


def _from_mode(value: Any) -> Any:
    if isinstance(value, str):
        if value not in get_args(_Mode):
            raise field_error(
                "invalid_value",
                f"Invalid value: '{value[:64]}'. "
                "Supported values are: 'none', 'auto', and 'required'.",
            )
        return ToolChoiceParam.model_construct(type=value, function=None)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise field_error("invalid_type", "one of a string or object")
    return value


ToolChoiceOption = Annotated[
    ToolChoiceParam, BeforeValidator(_from_mode, json_schema_input_type=_Mode | ToolChoiceParam)
]


def check_tools(tools: list[ToolParam], choice: ToolChoiceParam | None) -> None:
    """Raises ServiceError for duplicate names, and for a tool choice that cannot be met."""
    names = [tool.function.name for tool in tools]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise ServiceError(
                "invalid_value",
                f"Two tools are called '{name}'.",
                param=f"tools[{position}].function.name",
            )
    if choice is None or choice.type in ("none", "auto"):
        return
    if not tools:
        raise contradiction("tool_choice", "is only allowed when 'tools' are specified.")
    if choice.type == "function" and choice.function.name not in names:
        raise ServiceError(
            "invalid_value",
            f"Invalid value for 'tool_choice': no function is called '{choice.function.name}'.",
            param="tool_choice.function.name",
        )
