"""Messages to the prompt's token ids, so that no text of a message becomes a control token.

The template must see the messages' real text, as it may trim, split or compare it; but in what it
renders, its own control tokens have to be told from those that a message spells out. So, first,
each control token inside a message is broken by a mark, one character that no message has, put
behind its first character; and a message whose edge could complete a control token together with
its surroundings gets a mark at that edge. Second, the template renders. Third, the control tokens
that are still whole are the template's own: they get the tokenizer's secret names. Last, the marks
go, and the tokenizer, which knows control tokens by their secret names alone, encodes the whole
text at once. Without control tokens in messages nothing was marked, and the ids are those of
Hugging Face's `apply_chat_template`.

What is left to the operator's template is to spell no control token around a piece that it cuts
out of a message's middle.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizer_svc.chat_template import ChatTemplate
from tokenizer_svc.request import Message, Role, ToolCall
from tokenizer_svc.tokenizer import Tokenizer
from trivium.wire.errors import ServiceError

_Change = Callable[[str], str]

# Characters that no text is supposed to have, then private ones that hardly any has.
_MARKS = [chr(code) for code in (*range(0xFDD2, 0xFDF0), *range(0xE000, 0xF900))]


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: as text, control tokens written out, and as token ids."""

    text: str
    token_ids: list[int]


class PromptBuilder:
    """Renders and encodes conversations for one model. May be used from any thread."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._guard = _Guard(tokenizer.control_tokens)

    def build(self, messages: Sequence[Message]) -> Prompt:
        """The prompt up to the assistant's answer; ServiceError if the template refuses."""
        mark = _unused_character(self._texts(messages))
        guarded = [
            self._for_template(message, lambda text: self._guard.text(text, mark))
            for message in messages
        ]
        rendered = self._template.render(guarded)
        named = self._guard.whole.sub(lambda m: self._tokenizer.control_name(m[0]), rendered)
        token_ids = self._tokenizer.encode(named.replace(mark, ""))
        return Prompt(rendered.replace(mark, ""), token_ids)

    def _texts(self, messages: Sequence[Message]) -> list[str]:
        texts: list[str] = []

        def note(text: str) -> str:
            texts.append(text)
            return text

        for message in messages:
            self._for_template(message, note)
        return texts

    def _for_template(self, message: Message, change: _Change) -> dict[str, Any]:
        """A message as templates expect it, `change` applied to all of its text."""
        assert message.role is not None, "An unchecked message reached the template. This is a bug."
        role = Role.SYSTEM if message.role is Role.DEVELOPER else message.role
        result: dict[str, Any] = {"role": role.value}
        if message.content is not None:
            result["content"] = change(message.content)
        else:  # most templates join content to text and refuse null
            null_is_known = message.tool_calls and self._template.knows_tool_calls
            result["content"] = None if null_is_known else ""
        if message.name is not None:
            result["name"] = change(message.name)
        if message.tool_calls:
            result["tool_calls"] = [_tool_call(call, change) for call in message.tool_calls]
        if message.tool_call_id is not None:
            result["tool_call_id"] = change(message.tool_call_id)
        return result


class _Guard:
    """Breaks the control tokens that a message spells out.

    Control tokens of a single character cannot be broken; no known model has one.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        any_token = "|".join(map(re.escape, tokens)) or r"(?!)"
        self.whole = re.compile(any_token)
        # Looking ahead finds occurrences that overlap as well.
        self._broken = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)
        self._tokens = tokens
        self._beginnings = {token[:cut] for token in tokens for cut in range(1, len(token))}
        self._endings = {token[cut:] for token in tokens for cut in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def text(self, text: str, mark: str) -> str:
        """The text of a message with a mark wherever a control token is or could begin or end."""
        if self.whole.search(text):  # this is quick, and looking ahead everywhere is not
            text = self._broken.sub(rf"\g<1>{mark}", text)
        inner = text.strip()
        if not inner:
            return text
        cuts = range(1, min(self._longest, len(inner) + 1))
        # The mark stands next to the text, inside of white space that a template may trim.
        if any(inner[:cut] in self._endings for cut in cuts) or self._is_inside(inner):
            text = text.replace(inner, mark + inner, 1)
        if any(inner[-cut:] in self._beginnings for cut in cuts):
            end = len(text.rstrip())
            text = text[:end] + mark + text[end:]
        return text

    def _is_inside(self, inner: str) -> bool:
        return len(inner) < self._longest and any(inner in token for token in self._tokens)


def _tool_call(call: ToolCall, change: _Change) -> dict[str, Any]:
    function = {"name": change(call.name), "arguments": _arguments(call.arguments, change)}
    return {"id": change(call.id), "type": "function", "function": function}


def _arguments(text: str, change: _Change) -> Any:
    """Templates expect arguments as an object; text that is none stays text."""
    try:
        parsed = json.loads(text)
        return _changed(parsed, change) if isinstance(parsed, dict) else change(text)
    except (ValueError, RecursionError):
        return change(text)


def _changed(value: Any, change: _Change) -> Any:
    if isinstance(value, str):
        return change(value.encode("utf-8", "replace").decode())  # JSON can spell lone surrogates
    if isinstance(value, dict):
        return {_changed(key, change): _changed(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_changed(inner, change) for inner in value]
    return value


def _unused_character(texts: Sequence[str]) -> str:
    for mark in _MARKS:
        if not any(mark in text for text in texts):
            return mark
    message = "The messages use every private character, so that none is left to tell text apart."
    raise ServiceError("invalid_chat_template_input", message, "messages")
