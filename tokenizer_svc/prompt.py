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

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tokenizer_svc.chat_template import ChatTemplate
from tokenizer_svc.families.thinking import Thinking, thinking_after
from tokenizer_svc.guard import Guard
from tokenizer_svc.request import Conversation
from tokenizer_svc.template_input import Leniency, changed, message_input, tool_input
from tokenizer_svc.template_variables import template_variables
from tokenizer_svc.tokenizer import Tokenizer
from tokenizer_svc.tool_text import with_tools, without_roles
from trivium.wire.errors import ServiceError

# Characters that no text is supposed to have, then private ones that hardly any has.
_MARKS = [chr(code) for code in (*range(0xFDD2, 0xFDF0), *range(0xE000, 0xF900))]


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: as text, control tokens written out, and as token ids.

    `thinking` is whether the model's answer begins with its reasoning.
    """

    text: str
    token_ids: list[int]
    thinking: Thinking = Thinking.DONE


class PromptBuilder:
    """Renders and encodes conversations for one model. May be used from any thread.

    `variables` are the further template variables that a request may set.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, variables: Set[str] = frozenset()
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._variables = variables
        self._guard = Guard(tokenizer.control_tokens)

    def build(self, conversation: Conversation) -> Prompt:
        """The prompt up to the assistant's answer; ServiceError if the template refuses."""
        variables = template_variables(conversation, self._template.whole_source, self._variables)
        mark = _unused_character(self._texts(conversation, variables))
        rendered = self._render(conversation, variables, lambda text: self._guard.text(text, mark))
        named = self._guard.whole.sub(lambda m: self._tokenizer.control_name(m[0]), rendered)
        token_ids = self._tokenizer.encode(named.replace(mark, ""))
        text = rendered.replace(mark, "")
        own = conversation.messages[-1].content if conversation.continue_final_message else None
        return Prompt(text, token_ids, thinking_after(text, own or ""))

    def _texts(self, conversation: Conversation, variables: Mapping[str, Any]) -> list[str]:
        texts: list[str] = []

        def note(text: str) -> str:
            texts.append(text)
            return text

        for message in conversation.messages:
            message_input(message, self._template, note)
        for tool in conversation.tools:
            tool_input(tool, note)
        changed(variables, note)
        return texts

    def _render(
        self,
        conversation: Conversation,
        variables: Mapping[str, Any],
        change: Callable[[str], str],
    ) -> str:
        """What the template makes of the conversation, `change` applied to all of its text."""
        refusal: ServiceError | None = None
        for leniency in Leniency:
            try:
                return self._render_with(conversation, variables, change, leniency)
            except ServiceError as error:
                refusal = refusal or error
        assert refusal is not None, "Nothing was tried. This is a bug."
        raise refusal

    def _render_with(
        self,
        conversation: Conversation,
        variables: Mapping[str, Any],
        change: Callable[[str], str],
        leniency: Leniency,
    ) -> str:
        template = self._template
        messages: Sequence[Mapping[str, Any]] = [
            message_input(message, template, change, leniency) for message in conversation.messages
        ]
        tools: list[dict[str, Any]] | None = [
            tool_input(tool, change, leniency) for tool in conversation.tools
        ] or None
        if not template.knows_tool_calls:
            messages = without_roles(messages)
        if tools is not None and not template.shows_tools:
            messages, tools = with_tools(messages, tools, template.knows_system), None
        opens = conversation.add_generation_prompt is not False
        opens = opens and not conversation.continue_final_message
        rendered = template.render(messages, tools, opens, changed(variables, change))
        if conversation.continue_final_message:
            return _up_to(rendered, str(messages[-1]["content"]))
        return rendered


def _up_to(rendered: str, last: str) -> str:
    """The prompt cut behind the last message's text, as Hugging Face does it."""
    at = rendered.rfind(last.strip())
    if at < 0:
        message = "The model's chat template does not show the final message as it is."
        raise ServiceError("invalid_chat_template_input", message, "messages")
    kept = last.lstrip() if rendered[at:].startswith(last.lstrip()) else last.strip()
    return rendered[: at + len(kept)]


def _unused_character(texts: Sequence[str]) -> str:
    for mark in _MARKS:
        if not any(mark in text for text in texts):
            return mark
    message = "The messages use every private character, so that none is left to tell text apart."
    raise ServiceError("invalid_chat_template_input", message, "messages")
