"""Messages and tools as chat templates expect them, with a change made to all of their text.

Knows nothing of tokens.
"""

import hashlib
import json
import re
from collections.abc import Callable
from enum import Enum
from typing import Any

from tokenizer_svc.chat_template import ChatTemplate
from tokenizer_svc.request import Message, Role, Tool, ToolCall

Change = Callable[[str], str]


class Leniency(Enum):
    """What a template that refuses the plain form may be tried with."""

    NONE = "none"
    FILLED_TOOLS = "filled tools"  # descriptions and parameters that are absent are empty
    ARGUMENTS_AS_TEXT = "arguments as text"  # those of calls, which DeepSeek's joins to text


def message_input(
    message: Message,
    template: ChatTemplate,
    change: Change,
    leniency: Leniency = Leniency.NONE,
) -> dict[str, Any]:
    """A message that was checked."""
    assert message.role is not None, "An unchecked message reached the template. This is a bug."
    role = Role.SYSTEM if message.role is Role.DEVELOPER else message.role
    result: dict[str, Any] = {"role": role.value}
    if message.content is not None:
        result["content"] = change(message.content)
    else:  # most templates join content to text and refuse null
        null_is_known = message.tool_calls and template.knows_tool_calls
        result["content"] = None if null_is_known else ""
    if message.name is not None:
        result["name"] = change(message.name)
    if message.reasoning is not None:
        result |= _reasoning(message, template.whole_source, change(message.reasoning))
    if message.tool_calls:
        result["tool_calls"] = [
            _tool_call(call, template, change, leniency) for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = change(_call_id(message.tool_call_id, template))
    return result


def _reasoning(message: Message, source: str, text: str) -> dict[str, Any]:
    """Under the names that templates use; gpt-oss's takes no text besides it where calls are."""
    names = {"reasoning_content": text}
    if "message.thinking" in source and not (message.tool_calls and message.content):
        names["thinking"] = text
    return names


def tool_input(tool: Tool, change: Change, leniency: Leniency = Leniency.NONE) -> dict[str, Any]:
    """A tool as OpenAI writes it."""
    function: dict[str, Any] = {"name": change(tool.name or "")}
    if leniency is not Leniency.NONE:
        function |= {"description": "", "parameters": {"type": "object", "properties": {}}}
    if tool.description is not None:
        function["description"] = change(tool.description)
    if tool.parameters is not None:
        function["parameters"] = changed(json.loads(tool.parameters), change)
    return {"type": "function", "function": function}


def _tool_call(
    call: ToolCall, template: ChatTemplate, change: Change, leniency: Leniency
) -> dict[str, Any]:
    as_text = leniency is Leniency.ARGUMENTS_AS_TEXT
    arguments = change(call.arguments) if as_text else _arguments(call.arguments, change)
    function = {"name": change(call.name), "arguments": arguments}
    call_id = change(_call_id(call.id, template))
    return {"id": call_id, "type": "function", "function": function}


def _call_id(call_id: str, template: ChatTemplate) -> str:
    """The id of a call; another in its place where the template would refuse it."""
    if not template.short_call_ids or re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _arguments(text: str, change: Change) -> Any:
    """Templates expect arguments as an object; text that is none stays text."""
    try:
        parsed = json.loads(text)
        return changed(parsed, change) if isinstance(parsed, dict) else change(text)
    except (ValueError, RecursionError):
        return change(text)


def changed(value: Any, change: Change) -> Any:
    """JSON with `change` made to every text in it."""
    if isinstance(value, str):
        return change(value.encode("utf-8", "replace").decode())  # JSON can spell lone surrogates
    if isinstance(value, dict):
        return {changed(key, change): changed(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed(inner, change) for inner in value]
    return value
