"""Probes what a chat template accepts and shows, by rendering small conversations at load time.

The output decides, not the source: templates differ in what they refuse, print as the word None, or
silently leave out.
"""

from dataclasses import dataclass, replace
from typing import Any

from tokenizer_svc.prompt.chat_template import ChatTemplate
from trivium.wire.errors import ServiceError

_TEXT = "trivium_text"
# Names under which templates look for an assistant's reasoning.
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking", "thought")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class TemplateTraits:
    """How conversations have to be written for a template, either with or without tools.

    The defaults are for a template that shows no calls: it is given them as text.
    """

    shows_calls: bool = False
    null_content: bool = False  # absent text of a message with calls is None, not ""
    arguments_as_text: bool = False  # arguments of calls are JSON text, not an object
    accepts_invalid_arguments: bool = True  # those that are not a JSON object are shown as they are
    parallel_calls: bool = True  # all calls of a message are shown
    calls_with_text: bool = True  # calls of a message that has text are shown
    reasoning_name: str = _REASONING_NAMES[0]
    reasoning_with_text_and_calls: bool = True  # reasoning is accepted beside text and calls
    later_system_messages: bool = True  # system messages after the first are shown
    short_call_ids: bool = False  # ids of calls are nine letters and digits, as in Mistral's


class TemplateProbe:
    """Renders small conversations with one template, with or without tools, and reads them."""

    def __init__(self, template: ChatTemplate, with_tools: bool) -> None:
        self._template = template
        self._with_tools = with_tools

    def shows_tools(self) -> bool:
        """Whether tools reach the prompt."""
        return self._shows([_user()], "trivium_call_0")

    def shows_system(self) -> bool:
        """Whether a system message at the beginning reaches the prompt."""
        return self._shows([_system(_TEXT), _user()], _TEXT)

    def traits(self) -> TemplateTraits:
        """Probes all traits, with about twenty renderings."""
        short_ids = "length 9" in self._template.whole_source
        traits = replace(self._call_form(), short_call_ids=short_ids)
        if traits.shows_calls:
            invalid = '{"trivium_odd": "trivium_cut'
            traits = replace(
                traits,
                accepts_invalid_arguments=self._shows(
                    _conversation_with_calls(traits, arguments=invalid),
                    "trivium_odd",
                    "trivium_cut",
                ),
                parallel_calls=self._shows(
                    _conversation_with_calls(traits, calls=2), *_expected_words(2)
                ),
                calls_with_text=self._shows(
                    _conversation_with_calls(traits, content=_TEXT), *_expected_words(1)
                ),
            )
        later = [_system("trivium_first"), _user(), _answer(), _system(_TEXT), _user()]
        traits = replace(traits, later_system_messages=self._shows(later, "trivium_first", _TEXT))
        return self._with_reasoning(traits)

    def _call_form(self) -> TemplateTraits:
        """The form in which a call and its result are shown, if there is one."""
        found = []
        for text in (False, True):
            for null in (False, True):
                form = TemplateTraits(True, null_content=null, arguments_as_text=text)
                prompt = self._prompt(_conversation_with_calls(form))
                if all(word in prompt for word in _expected_words(1)):
                    found.append((prompt, form))

        def flaws(candidate: tuple[str, TemplateTraits]) -> tuple[bool, bool, int, int]:
            # A template that writes arguments as JSON would quote text, so objects are preferred
            # unless it prints them like Python. Absent content that is shown, as None, as null or
            # as an empty turn, makes the longer prompt.
            prompt, form = candidate
            is_python = "{'trivium_key" in prompt
            return is_python, form.arguments_as_text, prompt.count("None"), len(prompt)

        return min(found, key=flaws)[1] if found else TemplateTraits()

    def _with_reasoning(self, traits: TemplateTraits) -> TemplateTraits:
        for name in _REASONING_NAMES:
            conversations = [[_user(), _answer() | {name: _TEXT}]]
            if traits.shows_calls:  # many templates show it nowhere else
                conversations.append(
                    _add_to_assistant(_conversation_with_calls(traits), {name: _TEXT})
                )
            if any(self._shows(messages, _TEXT) for messages in conversations):
                traits = replace(traits, reasoning_name=name)
                break
        if not (traits.shows_calls and traits.calls_with_text):
            return traits
        both = _add_to_assistant(
            _conversation_with_calls(traits, content="a"), {traits.reasoning_name: _TEXT}
        )
        return replace(traits, reasoning_with_text_and_calls=self._shows(both))

    def _shows(self, messages: Messages, *words: str) -> bool:
        prompt = self._prompt(messages)
        return bool(prompt) and all(word in prompt for word in words)

    def _prompt(self, messages: Messages) -> str:
        """The rendered prompt; empty if the template refuses."""
        try:
            return self._template.render(messages, _tools() if self._with_tools else None)
        except ServiceError:
            return ""


# New objects for each rendering, as a template may modify its input.


def _tools() -> Messages:
    schema = {"type": "object", "properties": {}}
    functions = [
        {"name": f"trivium_call_{index}", "description": "Nothing.", "parameters": schema}
        for index in range(2)
    ]
    return [{"type": "function", "function": function} for function in functions]


def _user() -> dict[str, Any]:
    return {"role": "user", "content": "Hello"}


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _answer() -> dict[str, Any]:
    return {"role": "assistant", "content": "Hello"}


def _conversation_with_calls(
    form: TemplateTraits,
    calls: int = 1,
    arguments: str | None = None,
    content: str | None = None,
) -> Messages:
    """A question, calls in this form, and their results."""
    made, results = [], []
    for index in range(calls):
        value: Any = {f"trivium_key_{index}": f"trivium_value_{index}"}
        if arguments is not None:
            value = arguments
        elif form.arguments_as_text:
            value = f'{{"trivium_key_{index}": "trivium_value_{index}"}}'
        call_id = f"trivium0{index}"  # nine letters and digits, as Mistral's templates require
        function = {"name": f"trivium_call_{index}", "arguments": value}
        made.append({"id": call_id, "type": "function", "function": function})
        result = {"role": "tool", "content": f"trivium_result_{index}", "tool_call_id": call_id}
        results.append(result)
    if content is None and not form.null_content:
        content = ""
    return [_user(), {"role": "assistant", "content": content, "tool_calls": made}, *results]


def _add_to_assistant(messages: Messages, more: dict[str, Any]) -> Messages:
    """The same messages with `more` in the assistant's."""
    return [message | more if message["role"] == "assistant" else message for message in messages]


def _expected_words(calls: int) -> list[str]:
    """What the prompt has to show of this many calls. Their names are among the tools anyway."""
    return [
        f"trivium_{part}_{index}" for part in ("key", "value", "result") for index in range(calls)
    ]
