"""The tools of a request, and which of them are to be called."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from rest_facade.requests.field import Name, ObjectText, Strict, field_error, reject_unsupported
from trivium.field_errors import (
    choice_without_tools,
    contradiction,
    duplicate_tool,
    missing,
    unknown_tool,
)
from trivium.limits import MAX_TOOLS


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


class AllowedTool(Strict):
    """A tool that may be called."""

    type: Annotated[Literal["function"], reject_unsupported("custom")] = "function"
    function: FunctionName


class AllowedTools(Strict):
    """The tools that may be called; the prompt has all tools."""

    mode: Literal["auto", "required"] = Field(
        description="Whether the model may call one of them, or has to."
    )
    tools: Annotated[
        list[AllowedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)
    ] = Field(description="These tools, by their functions' names.")


def _known_type(kind: str) -> str:
    if kind == "custom":
        raise field_error("unsupported_value", f"Tool choices of type '{kind}' are not supported.")
    if kind not in ("function", "allowed_tools"):
        raise field_error(
            "invalid_value",
            f"Invalid value: '{kind[:64]}'. Supported values are: 'function' and 'allowed_tools'.",
        )
    return kind


class ToolChoiceParam(Strict):
    """The function to call, or those that may be called; the modes 'none', 'auto' and 'required'
    are plain strings."""

    type: Annotated[str, AfterValidator(_known_type)] = Field(
        "function", json_schema_extra={"enum": ["function", "allowed_tools"]}
    )
    function: FunctionName | None = Field(None, description="Only with type 'function'.")
    allowed_tools: AllowedTools | None = Field(None, description="Only with type 'allowed_tools'.")

    def chosen(self) -> dict[str, str]:
        """The names of the functions that it lists, by the field that holds each."""
        if self.function is not None:
            return {"tool_choice.function.name": self.function.name}
        tools = self.allowed_tools.tools if self.allowed_tools is not None else []
        return {
            f"tool_choice.allowed_tools.tools[{index}].function.name": tool.function.name
            for index, tool in enumerate(tools)
        }

    def check(self) -> None:
        """Raises ServiceError for fields that do not go together."""
        values = {"function": self.function, "allowed_tools": self.allowed_tools}
        for name, value in values.items():
            if name == self.type and value is None:
                raise missing(f"tool_choice.{name}")
            if name != self.type and value is not None:
                raise contradiction(
                    f"tool_choice.{name}", f"is only allowed with the type '{name}'."
                )


_Mode = Literal["none", "auto", "required"]


def _from_mode(value: Any) -> Any:
    if isinstance(value, str):
        if value not in get_args(_Mode):
            raise field_error(
                "invalid_value",
                f"Invalid value: '{value[:64]}'. "
                "Supported values are: 'none', 'auto', and 'required'.",
            )
        return ToolChoiceParam.model_construct(type=value)
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
            raise duplicate_tool(f"tools[{position}].function.name", name)
    if choice is None or choice.type in ("none", "auto"):
        return
    choice.check()
    if not tools:
        raise choice_without_tools()
    chosen = choice.chosen()
    for position, (param, name) in enumerate(chosen.items()):
        if name not in names:
            raise unknown_tool(param, name)
        if name in list(chosen.values())[:position]:
            raise duplicate_tool(param, name)
