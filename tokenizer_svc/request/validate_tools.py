"""Validates tools and which of them are to be called.

Raises ServiceError as `validate` does. The generator compiles schemas and may still refuse them.
"""

import re
from collections.abc import Sequence

from tokenizer_svc.request.field_checks import check_length
from tokenizer_svc.request.json_schema import check_schema
from tokenizer_svc.request.types import Tool, ToolChoice, ToolMode, ToolUse
from trivium.field_errors import (
    check_array,
    check_nonempty,
    choice_without_tools,
    contradiction,
    duplicate_tool,
    malformed_name,
    missing,
    unknown_tool,
    unknown_value,
)
from trivium.limits import MAX_NAME_CHARACTERS, MAX_TOOLS, NAME_PATTERN
from trivium.wire.errors import ServiceError

_NAME = re.compile(NAME_PATTERN)


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises ServiceError for the first error in the list of tools, if there is one."""
    check_array("tools", tools, MAX_TOOLS)
    seen = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if tool.name is None:
            raise unknown_value(f"{where}.type", "'function'")
        check_name(f"{where}.function.name", tool.name)
        if tool.name in seen:
            raise duplicate_tool(f"{where}.function.name", tool.name)
        seen.add(tool.name)
        if tool.parameters is not None:
            check_parameters(tool.parameters, f"{where}.function.parameters")


def check_name(field: str, name: str) -> None:
    """Raises ServiceError for an invalid name of a function or a response format."""
    if not name:
        raise missing(field)
    check_length(field, name, MAX_NAME_CHARACTERS)
    if not _NAME.fullmatch(name):
        raise malformed_name(field)


def check_parameters(text: str, field: str) -> None:
    """Raises ServiceError if the schema is invalid, or is not that of an object."""
    schema = check_schema(text, field)
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        message = f"Invalid schema for '{field}': it must be an object of 'type: \"object\"'."
        raise ServiceError("invalid_json_schema", message, field)


def tool_use(tools: tuple[Tool, ...], choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """Which tools the answer may or must call; `tools` have been validated."""
    choice = choice or ToolChoice(ToolMode.AUTO)
    mode = choice.mode
    if mode is None:
        modes = ", ".join(f"'TOOL_CHOICE_MODE_{known.name}'" for known in ToolMode)
        raise unknown_value("tool_choice", modes)
    if choice.function_name and mode is not ToolMode.FUNCTION:
        raise contradiction(
            "tool_choice.function.name", "is only allowed with TOOL_CHOICE_MODE_FUNCTION."
        )
    if choice.allowed is not None and mode not in (ToolMode.AUTO, ToolMode.REQUIRED):
        raise contradiction(
            "tool_choice.allowed_tools",
            "is only allowed with TOOL_CHOICE_MODE_AUTO and TOOL_CHOICE_MODE_REQUIRED.",
        )
    if not tools and (mode in (ToolMode.REQUIRED, ToolMode.FUNCTION) or choice.allowed is not None):
        raise choice_without_tools()
    if not tools or mode is ToolMode.NONE:
        return ToolUse()
    names = _chosen_names(tools, choice)
    indices = tuple(index for index, tool in enumerate(tools) if tool.name in names)
    return ToolUse(
        tools=tuple(tools[index] for index in indices),
        indices=indices,
        forced=mode is not ToolMode.AUTO,
        parallel=parallel is not False and mode is not ToolMode.FUNCTION,
        named=mode is ToolMode.FUNCTION,
        restricted=choice.allowed is not None,
    )


def _chosen_names(tools: Sequence[Tool], choice: ToolChoice) -> set[str | None]:
    """The names of the functions that may be called."""
    names = {tool.name for tool in tools}
    if choice.mode is ToolMode.FUNCTION:
        if not choice.function_name:
            raise missing("tool_choice.function.name")
        if choice.function_name not in names:
            raise unknown_tool("tool_choice.function.name", choice.function_name)
        return {choice.function_name}
    if choice.allowed is None:
        return names
    check_nonempty("tool_choice.allowed_tools.tools", choice.allowed)
    check_array("tool_choice.allowed_tools.tools", choice.allowed, MAX_TOOLS)
    allowed: set[str | None] = set()
    for index, name in enumerate(choice.allowed):
        field = f"tool_choice.allowed_tools.tools[{index}].function.name"
        if name not in names:
            raise unknown_tool(field, name)
        if name in allowed:
            raise duplicate_tool(field, name)
        allowed.add(name)
    return allowed
