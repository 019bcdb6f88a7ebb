"""Builds prompts: messages to token ids, so that no text of a message becomes a control token.

The template must see the messages' real text, as it may trim, split or compare it; but in the
rendered text, its own control tokens must not be confused with those that a message spells out. So,
first, each control token in a message is broken by a mark, a character that occurs in no message,
inserted after its first character; and a message whose edge could complete a control token together
with its surroundings gets a mark at that edge. Second, the template renders. Third, the control
tokens that are still intact are the template's own: they are replaced by the tokenizer's secret
names. Last, the marks are removed, and the tokenizer, which knows control tokens by their secret
names only, encodes the whole text at once. If messages spell no control tokens, the ids are those
of Hugging Face's `apply_chat_template`.

One thing is up to the operator's template: not to build a control token around a piece cut out of
the middle of a message.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

from tokenizer_svc.families.thinking import Thinking, thinking_after
from tokenizer_svc.prompt.chat_template import ChatTemplate
from tokenizer_svc.prompt.control_tokens import ControlTokenEscaper
from tokenizer_svc.prompt.message_folding import FOLDINGS, Folding, folded
from tokenizer_svc.prompt.template_input import (
    map_strings,
    message_input,
    split_calls,
    template_variables,
    tool_input,
)
from tokenizer_svc.prompt.template_traits import TemplateProbe
from tokenizer_svc.prompt.tool_prompt import calls_as_text, with_tools
from tokenizer_svc.request.types import SYSTEM_ROLES, Conversation
from tokenizer_svc.tokenizer import Tokenizer
from trivium.wire import tracing
from trivium.wire.errors import ServiceError

log = logging.getLogger(__name__)

_STEP_CHARACTERS = 65_536
_ESCAPED = re.compile(r"\\u([0-9a-f]{4})")  # as `_escape` writes it
# Noncharacters, which no text should contain, then private-use characters, which hardly any does.
_MARKS = [chr(code) for code in (*range(0xFDD2, 0xFDF0), *range(0xE000, 0xF900))]


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: as text, with control tokens spelled out, and as token ids.

    `thinking` is whether the model's answer begins with reasoning.
    """

    text: str
    token_ids: list[int]
    thinking: Thinking = Thinking.DONE


class ToolForm(Enum):
    """How a conversation's tools reach the prompt."""

    NONE = "none"  # there are none
    NATIVE = "native"  # the template renders them as they are
    FILLED = "filled"  # the same, with absent descriptions and parameters as empty ones
    TEXT = "text"  # described in a message, for templates that refuse or ignore tools


class PromptBuilder:
    """Renders and encodes conversations for one model. May be used from any thread.

    `variables` are the extra template variables that a request may set. With `fold_messages`,
    conversations that the template refuses, or shows in part, are tried in other forms; `model` is
    the model's name in log lines.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        variables: Set[str] = frozenset(),
        fold_messages: bool = True,
        model: str = "",
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._variables = variables
        self._escaper = ControlTokenEscaper(tokenizer.control_tokens)
        self._fold_messages = fold_messages
        self._model = model
        self._fold_is_logged = False
        plain_probe, tools_probe = TemplateProbe(template, False), TemplateProbe(template, True)
        self.shows_tools = tools_probe.shows_tools()
        self._shows_system = plain_probe.shows_system()
        self._traits = plain_probe.traits()
        self._traits_with_tools = tools_probe.traits() if self.shows_tools else self._traits

    def build(self, conversation: Conversation, max_tokens: int | None = None) -> Prompt:
        """The prompt up to the assistant's answer; raises ServiceError if the template refuses it.

        May raise TooManyTokens for a prompt of more than `max_tokens`.
        """
        with tracing.span("render"):
            whole = self._template.whole_source
            variables = template_variables(conversation, whole, self._variables)
            mark = _unused_character(self._texts(conversation, variables))
            rendered = self._render(
                conversation, variables, lambda text: self._escaper.escaped(text, mark)
            )
        with tracing.span("encode"):
            named = self._escaper.renamed(rendered, self._tokenizer.control_name)
            token_ids = self._tokenizer.encode(_without(mark, named), max_tokens=max_tokens)
        text = _without(mark, rendered)
        own = conversation.messages[-1].content if conversation.continue_final_message else None
        return Prompt(text, token_ids, thinking_after(text, own or ""))

    def _texts(self, conversation: Conversation, variables: Mapping[str, Any]) -> list[str]:
        texts: list[str] = []

        def collect(text: str) -> str:
            texts.append(text)
            return text

        for traits in {self._traits, self._traits_with_tools}:
            for message in conversation.messages:
                message_input(message, traits, collect)
        for tool in conversation.tools:
            tool_input(tool, collect)
        map_strings(variables, collect)
        return texts

    def _render(
        self,
        conversation: Conversation,
        variables: Mapping[str, Any],
        change: Callable[[str], str],
    ) -> str:
        """Renders the conversation, with `change` applied to all of its text."""
        refusal: ServiceError | None = None
        tried: list[Any] = []
        add_generation_prompt = conversation.add_generation_prompt is not False
        add_generation_prompt = add_generation_prompt and not conversation.continue_final_message
        for folding, form in product(self._foldings(conversation), self._tool_forms(conversation)):
            messages, tools = self._input(conversation, change, form, folding)
            if (messages, tools) in tried:
                continue
            tried.append((messages, tools))
            last = str(messages[-1]["content"])
            try:
                rendered = self._template.render(
                    messages, tools, add_generation_prompt, map_strings(variables, change)
                )
            except ServiceError as error:
                refusal = refusal or error
                continue
            if folding is not None:
                self._log_fold()
            return _cut_after(rendered, last) if conversation.continue_final_message else rendered
        assert refusal is not None, "Nothing was tried. This is a bug."
        raise refusal

    def _foldings(self, conversation: Conversation) -> Sequence[Folding | None]:
        """The foldings to try, in order; None is the conversation as it is."""
        traits = self._traits_with_tools if conversation.tools else self._traits
        later = any(message.role in SYSTEM_ROLES for message in conversation.messages[1:])
        left_out = later and not traits.later_system_messages
        if self._fold_messages:
            return FOLDINGS if left_out else (None, *FOLDINGS)
        if left_out:
            message = "The model's chat template shows no system messages after the first."
            raise ServiceError("invalid_chat_template_input", message, "messages")
        return (None,)

    def _tool_forms(self, conversation: Conversation) -> tuple[ToolForm, ...]:
        if not conversation.tools:
            return (ToolForm.NONE,)
        if not self.shows_tools:
            return (ToolForm.TEXT,)
        return (ToolForm.NATIVE, ToolForm.FILLED, ToolForm.TEXT)

    def _input(
        self,
        conversation: Conversation,
        change: Callable[[str], str],
        form: ToolForm,
        folding: Folding | None,
    ) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools for the template, new objects each time, as it may modify them."""
        is_native = form in (ToolForm.NATIVE, ToolForm.FILLED)
        traits = self._traits_with_tools if is_native else self._traits
        messages: Sequence[Mapping[str, Any]] = [
            message_input(message, traits, change)
            for message in split_calls(conversation.messages, traits)
        ]
        if not traits.shows_calls:
            messages = calls_as_text(messages)
        if folding is not None:
            messages = folded(messages, folding)
        tools = [tool_input(tool, change, form is ToolForm.FILLED) for tool in conversation.tools]
        if form is ToolForm.TEXT:
            messages = with_tools(messages, tools, self._shows_system)
        return messages, tools if is_native else None

    def _log_fold(self) -> None:
        """Logs once: the operator should know, but clients must not be able to flood the log."""
        if self._fold_is_logged:
            return
        self._fold_is_logged = True
        log.warning(
            "model %s: folded a conversation that its chat template refuses or shows only in part; "
            "this is logged once (TRIVIUM_TOKENIZER_FOLD_MESSAGES=false refuses them instead)",
            self._model,
        )


def _cut_after(rendered: str, last: str) -> str:
    """The prompt cut off after the last message's text, as Hugging Face does it."""
    at = rendered.rfind(last.strip())
    if at < 0:
        message = "The model's chat template does not show the final message as it is."
        raise ServiceError("invalid_chat_template_input", message, "messages")
    kept = last.lstrip() if rendered[at:].startswith(last.lstrip()) else last.strip()
    return rendered[: at + len(kept)]


def _unused_character(texts: Sequence[str]) -> str:
    likely, *others = _MARKS
    if not any(likely in text or _escape(likely) in text for text in texts):
        return likely
    # One pass over a long text, in steps between which other threads can run.
    used: set[str] = set()
    for text in texts:
        for at in range(0, len(text), _STEP_CHARACTERS):
            step = text[at : at + _STEP_CHARACTERS + 5]  # an escape may go beyond the step
            used.update(step, (chr(int(code, 16)) for code in _ESCAPED.findall(step)))
    for mark in others:
        if mark not in used:
            return mark
    message = "The messages use every private character, so that none is left to tell text apart."
    raise ServiceError("invalid_chat_template_input", message, "messages")


def _without(mark: str, text: str) -> str:
    return text.replace(mark, "").replace(_escape(mark), "")


def _escape(mark: str) -> str:
    """The mark as escaped where a template prints values like Python, or JSON in ASCII."""
    return f"\\u{ord(mark):04x}"
