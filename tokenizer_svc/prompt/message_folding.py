"""Folds conversations for templates that refuse their roles or the order of their roles.

System messages become user messages, adjacent messages of one role are merged, and as a last resort
calls and results become text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizer_svc.prompt.tool_prompt import calls_as_text

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Folding:
    """How much a conversation is changed.

    `keeps_system`: system messages at the beginning stay. `alternates`: user and assistant messages
    alternate, with empty ones where one is missing.
    """

    keeps_system: bool
    alternates: bool = False
    calls_as_text: bool = False


# In the order of trying: the smallest changes come first.
FOLDINGS = tuple(
    Folding(keeps_system, *more)
    for more in ((False, False), (True, False), (True, True))
    for keeps_system in (True, False)
)


def folded(messages: Messages, folding: Folding) -> list[Mapping[str, Any]]:
    """The folded conversation; messages that need no change are the same objects."""
    if folding.calls_as_text:
        messages = calls_as_text(messages)
    result = _merged(_system_as_user(messages, folding.keeps_system)) or list(messages)
    return _alternating(result) if folding.alternates else result


def _system_as_user(messages: Messages, keeps_first: bool) -> Messages:
    result = []
    for message in messages:
        is_system = message["role"] == "system"
        keeps_first = keeps_first and is_system
        result.append({**message, "role": "user"} if is_system and not keeps_first else message)
    return result


def _merged(messages: Messages) -> list[Mapping[str, Any]]:
    """Merges adjacent messages of one role; an empty assistant message is left out."""
    runs: list[list[Mapping[str, Any]]] = []
    for message in messages:
        if message["role"] == "assistant" and not (message["content"] or _has_calls(message)):
            continue
        if runs and _can_merge(runs[-1][-1], message):
            runs[-1].append(message)
        else:
            runs.append([message])
    return [run[0] if len(run) == 1 else _one_message(run) for run in runs]


def _can_merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    is_same = first["role"] == second["role"] and first["role"] != "tool"
    return is_same and not _has_calls(first) and not _has_calls(second)


def _one_message(run: Messages) -> dict[str, Any]:
    """One message with the texts of all, and their name if it is the same."""
    merged: dict[str, Any] = {}
    for message in run:
        merged |= message
    if any(message.get("name") != run[0].get("name") for message in run):
        merged.pop("name")
    merged["content"] = "\n\n".join(message["content"] for message in run if message["content"])
    return merged


def _alternating(messages: Messages) -> list[Mapping[str, Any]]:
    """Inserts an empty message before an assistant message that begins the conversation, and before
    a user message that follows a call or its result."""
    result: list[Mapping[str, Any]] = []
    for message in messages:
        role, before = message["role"], result[-1] if result else {"role": "system"}
        if role == "assistant" and before["role"] == "system":
            result.append({"role": "user", "content": ""})
        elif role == "user" and (before["role"] == "tool" or _has_calls(before)):
            result.append({"role": "assistant", "content": ""})
        result.append(message)
    return result


def _has_calls(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls"))
