"""Messages, tools and variables as chat templates expect them.

`change` is applied to every text in them: it escapes control tokens.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from tokenizer_svc.families.thinking import OPENING
from tokenizer_svc.prompt.template_traits import TemplateTraits
from tokenizer_svc.request.field_checks import is_deeper
from tokenizer_svc.request.types import SYSTEM_ROLES, Conversation, Message, Role, Tool, ToolCall
from trivium.field_errors import unsupported_parameter

Change = Callable[[str], str]

# The key of arguments that are not a JSON object, for templates that only take objects. It also
# tells a model that reads its own broken call what is wrong with it.
INVALID_ARGUMENTS = "invalid_arguments"
MAX_ARGUMENTS_DEPTH = 64

_EFFORT = "reasoning_effort"
# Variables that switch reasoning on or off in templates without a reasoning effort.
_SWITCHES = ("enable_thinking", "thinking")


def split_calls(messages: Sequence[Message], traits: TemplateTraits) -> list[Message]:
    """Splits messages that the template would only show in part.

    Where the template needs it, text and calls in one message become two messages, and several
    calls become one message each, followed by its results.
    """
    result: list[Message] = []
    results_done = 0
    for index, message in enumerate(messages):
        if message.role is Role.TOOL and index < results_done:
            continue
        if message.tool_calls and message.content and not traits.calls_with_text:
            result.append(replace(message, tool_calls=()))
            message = replace(message, parts=(), reasoning=None)
        if len(message.tool_calls) < 2 or traits.parallel_calls:
            result.append(message)
            continue
        results_done = _end_of_results(messages, index + 1)
        result += _one_call_each(message, list(messages[index + 1 : results_done]))
    return result


def _end_of_results(messages: Sequence[Message], start: int) -> int:
    end = start
    while end < len(messages) and messages[end].role is Role.TOOL:
        end += 1
    return end


def _one_call_each(message: Message, results: list[Message]) -> list[Message]:
    """A message for each call; results that belong to none of them come last."""
    separate: list[Message] = []
    for call in message.tool_calls:
        separate.append(replace(message, tool_calls=(call,)))
        message = replace(message, parts=(), reasoning=None)
        separate += [own for own in results if own.tool_call_id == call.id]
        results = [other for other in results if other.tool_call_id != call.id]
    return separate + results


def message_input(message: Message, traits: TemplateTraits, change: Change) -> dict[str, Any]:
    """A validated message as the template expects it."""
    assert message.role is not None, "An unchecked message reached the template. This is a bug."
    role = Role.SYSTEM if message.role in SYSTEM_ROLES else message.role
    content: str | None = change(message.content or "")
    if message.tool_calls and not content and traits.null_content:
        content = None
    result: dict[str, Any] = {"role": role.value, "content": content}
    if message.name is not None:
        result["name"] = change(message.name)
    if message.reasoning is not None:
        both = message.tool_calls and message.content
        if traits.reasoning_with_text_and_calls or not both:
            result[traits.reasoning_name] = change(message.reasoning)
    if message.tool_calls:
        result["tool_calls"] = [_tool_call(call, traits, change) for call in message.tool_calls]
    if message.tool_call_id is not None:
        result["tool_call_id"] = change(_call_id(message.tool_call_id, traits))
    return result


def tool_input(tool: Tool, change: Change, filled: bool = False) -> dict[str, Any]:
    """A tool in OpenAI's format; `filled` adds fields that some templates require."""
    function: dict[str, Any] = {"name": change(tool.name or "")}
    if filled:
        function |= {"description": "", "parameters": {}}
    if tool.description is not None:
        function["description"] = change(tool.description)
    if tool.parameters is not None:
        function["parameters"] = map_strings(json.loads(tool.parameters), change)
    if filled:
        function["parameters"] = {"type": "object", "properties": {}} | function["parameters"]
    return {"type": "function", "function": function}


def _tool_call(call: ToolCall, traits: TemplateTraits, change: Change) -> dict[str, Any]:
    function = {"name": change(call.name), "arguments": _arguments(call.arguments, traits, change)}
    return {"id": change(_call_id(call.id, traits)), "type": "function", "function": function}


def _call_id(call_id: str, traits: TemplateTraits) -> str:
    """The id of a call, or a substitute if the template would refuse it."""
    if not traits.short_call_ids or re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _arguments(text: str, traits: TemplateTraits, change: Change) -> Any:
    """Arguments as the template takes them, valid or not.

    They are what a model once wrote, returned by the client, and may have been cut off.
    """
    if text.strip() in ("", "null"):
        text = "{}"
    if traits.arguments_as_text:
        return change(text)
    parsed = _json_object(text)
    if parsed is not None:
        return map_strings(parsed, change)
    return change(text) if traits.accepts_invalid_arguments else {INVALID_ARGUMENTS: change(text)}


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_right = isinstance(parsed, dict) and not is_deeper(parsed, MAX_ARGUMENTS_DEPTH)
    return parsed if is_right else None


def map_strings(value: Any, change: Change) -> Any:
    """JSON with `change` applied to every string in it."""
    if isinstance(value, str):
        return change(value.encode("utf-8", "replace").decode())  # JSON can spell lone surrogates
    if isinstance(value, dict):
        return {
            map_strings(key, change): map_strings(inner, change) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [map_strings(inner, change) for inner in value]
    return value


def template_variables(
    conversation: Conversation, source: str, allowed: Set[str]
) -> Mapping[str, Any]:
    """The variables by name; raises ServiceError for one not allowed or without meaning here."""
    variables = {}
    for name, text in conversation.variables.items():
        if name not in allowed:
            raise unsupported_parameter(f"chat_template_kwargs.{name}", "with this server")
        variables[name] = json.loads(text)
    if conversation.reasoning_effort is not None:
        variables |= _effort(conversation.reasoning_effort, source)
    return variables


def _effort(effort: str, source: str) -> dict[str, Any]:
    if _EFFORT in source:
        return {_EFFORT: effort}
    switches = [name for name in _SWITCHES if name in source]
    if not switches:
        if effort == "none" and OPENING not in source:
            return {}  # the model cannot reason anyway
        raise unsupported_parameter(_EFFORT, "with this model")
    return dict.fromkeys(switches, effort != "none")
