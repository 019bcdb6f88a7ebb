"""Validates tools and which of them are to be called.

Raises ServiceError as `validate` does. The generator compiles schemas and may still refuse them.
"""

import re
from collections.abc import Sequence

from tokenizer_svc.request.field_checks import check_array, check_length
from tokenizer_svc.request.json_schema import check_schema
from tokenizer_svc.request.types import Tool, ToolChoice, ToolMode, ToolUse
from trivium.field_errors import malformed_name, missing, unknown_value
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
            text = f"Invalid '{where}.function.name': there is another tool '{tool.name}'."
            raise ServiceError("invalid_value", text, f"{where}.function.name")
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
    mode = ToolMode.AUTO if choice is None else choice.mode
    if mode is None:
        modes = ", ".join(f"'{known.value}'" for known in ToolMode)
        raise unknown_value("tool_choice", modes)
    if not tools and mode in (ToolMode.REQUIRED, ToolMode.FUNCTION):
        text = "Invalid value for 'tool_choice': it is only allowed when 'tools' are specified."
        raise ServiceError("invalid_parameter_combination", text, "tool_choice")
    if not tools or mode is ToolMode.NONE:
        return ToolUse()
    indices = tuple(range(len(tools)))
    if mode is ToolMode.FUNCTION:
        name = None if choice is None else choice.function_name
        indices = tuple(index for index, tool in enumerate(tools) if tool.name == name)
        if not name:
            raise missing("tool_choice.function.name")
        if not indices:
            text = f"Tool choice '{name}' not found in 'tools' parameter."
            raise ServiceError("invalid_parameter_combination", text, "tool_choice")
    return ToolUse(
        tools=tuple(tools[index] for index in indices),
        indices=indices,
        forced=mode is not ToolMode.AUTO,
        parallel=parallel is not False and mode is not ToolMode.FUNCTION,
        named=mode is ToolMode.FUNCTION,
    )
