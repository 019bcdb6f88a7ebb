"""Messages and tools as chat templates expect them, with a change made to all of their text.

Knows nothing of tokens.
"""

import json
from collections.abc import Callable
from typing import Any

from tokenizer_svc.chat_template import ChatTemplate
from tokenizer_svc.request import Message, Role, Tool, ToolCall

Change = Callable[[str], str]


def message_input(message: Message, template: ChatTemplate, change: Change) -> dict[str, Any]:
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
        result |= _reasoning(message, template.source, change(message.reasoning))
    if message.tool_calls:
        result["tool_calls"] = [_tool_call(call, change) for call in message.tool_calls]
    if message.tool_call_id is not None:
        result["tool_call_id"] = change(message.tool_call_id)
    return result


def _reasoning(message: Message, source: str, text: str) -> dict[str, Any]:
    """Under the names that templates use; gpt-oss's takes no text besides it where calls are."""
    names = {"reasoning_content": text}
    if "message.thinking" in source and not (message.tool_calls and message.content):
        names["thinking"] = text
    return names


def tool_input(tool: Tool, change: Change) -> dict[str, Any]:
    """A tool as OpenAI writes it."""
    function: dict[str, Any] = {"name": change(tool.name or "")}
    if tool.description is not None:
        function["description"] = change(tool.description)
    if tool.parameters is not None:
        function["parameters"] = changed(json.loads(tool.parameters), change)
    return {"type": "function", "function": function}


def _tool_call(call: ToolCall, change: Change) -> dict[str, Any]:
    function = {"name": change(call.name), "arguments": _arguments(call.arguments, change)}
    return {"id": change(call.id), "type": "function", "function": function}


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
