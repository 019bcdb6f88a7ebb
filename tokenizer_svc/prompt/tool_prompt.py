"""Describes tools in a system message, in the Hermes format, for templates without tool support.

Such a template cannot show calls and their results either: calls become assistant text, results
user text.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

_BEFORE = (
    "You may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER = (
    "\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

Messages = Sequence[Mapping[str, Any]]


def with_tools(messages: Messages, tools: Messages, system: bool) -> list[Mapping[str, Any]]:
    """The messages with the tools described in the system message at the beginning.

    Without `system`, for templates without that role, they go into the first user message.
    """
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    description = f"{_BEFORE}{lines}{_AFTER}"
    role = "system" if system else "user"
    candidates = messages[:1] if system else messages
    index = next((at for at, message in enumerate(candidates) if message["role"] == role), None)
    if index is None:
        return [{"role": role, "content": description}, *messages]
    found = messages[index]
    text = found.get("content") or ""
    joined = f"{text}\n\n{description}" if system else f"{description}\n\n{text}"
    return [*messages[:index], {**found, "content": joined}, *messages[index + 1 :]]


def calls_as_text(messages: Messages) -> list[Mapping[str, Any]]:
    """The messages with calls and results as text; consecutive results become one message."""
    result: list[Mapping[str, Any]] = []
    for is_tool, group in groupby(messages, lambda message: message.get("role") == "tool"):
        if is_tool:
            texts = [
                f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
                for message in group
            ]
            result.append({"role": "user", "content": "\n".join(texts)})
            continue
        for message in group:
            if message.get("tool_calls"):
                texts = [message.get("content") or "", *map(_call_text, message["tool_calls"])]
                plain = {key: value for key, value in message.items() if key != "tool_calls"}
                message = plain | {"content": "\n".join(text for text in texts if text)}
            result.append(message)
    return result


def _call_text(call: Mapping[str, Any]) -> str:
    function = json.dumps(call["function"], ensure_ascii=False)
    return f"<tool_call>\n{function}\n</tool_call>"
