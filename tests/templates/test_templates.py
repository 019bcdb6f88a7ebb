"""Conversations that clients send, rendered with the chat templates of some seventy real models.

The templates are fetched by `make templates`; see download.py.
"""

import json

import pytest

from tests.templates.download import FOLDER
from tests.tokenizer_svc.sample_templates import SMOLLM2
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tokenizer_svc.prompt.builder import PromptBuilder
from tokenizer_svc.prompt.chat_template import ChatTemplate
from tokenizer_svc.request.types import Conversation, Message, Role, Tool, ToolCall
from tokenizer_svc.tokenizer import Tokenizer
from trivium.wire.errors import ServiceError

pytestmark = pytest.mark.templates

TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
# Templates that cannot render any conversation, with the error.
UNUSABLE = {
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",  # needs a custom variable
}
# Templates for use with tools, whose tokenizer_config.json also has a plain ChatML template.
FOR_TOOLS_ONLY = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
}
# A result without a call, which OpenAI refuses and this template drops: it expects a call first.
LEFT_OUT = {("google-gemma-4-31B-it", "no call before a result")}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where."}},
    "required": ["city"],
}
# Not the called tools, so that their names appear only in calls.
TOOLS = (Tool("lookup", "Looks something up.", json.dumps(SCHEMA)),)


def system(text: str) -> Message:
    return Message(Role.SYSTEM, (text,))


def user(text: str) -> Message:
    return Message(Role.USER, (text,))


def assistant(text: str | None, *calls: tuple[str, str], thought: str | None = None) -> Message:
    """An assistant message with these calls; their ids are call_0 and so on."""
    return Message(
        Role.ASSISTANT,
        () if text is None else (text,),
        tool_calls=tuple(
            ToolCall(f"call_{index}", name, arguments)
            for index, (name, arguments) in enumerate(calls)
        ),
        reasoning=thought,
    )


def result(index: int, *parts: str) -> Message:
    return Message(Role.TOOL, parts, tool_call_id=f"call_{index}")


PARIS = ("weather", '{"city": "Paris"}')
ROME = ("traffic", '{"city": "Rome"}')
ASKED = user("How is Paris?")

# Messages, and words that the prompt has to contain. The order may differ: DeepSeek's templates put
# all system messages first, Mistral's put them into the last question, and some show one call at a
# time.
PLAIN = {
    "a question": ([ASKED], ["How is Paris?"]),
    "a system message": ([system("Be brief."), ASKED], ["Be brief.", "How is Paris?"]),
    "a second system message": (
        [system("Be brief."), ASKED, assistant("Fine."), system("Be kind."), user("And Rome?")],
        ["Be brief.", "How is Paris?", "Fine.", "Be kind.", "And Rome?"],
    ),
    "two system messages at the beginning": (
        [system("Be brief."), system("Be kind."), ASKED],
        ["Be brief.", "Be kind.", "How is Paris?"],
    ),
    "a system message at the end": ([ASKED, system("Be kind.")], ["How is Paris?", "Be kind."]),
    "two questions": ([ASKED, user("And Rome?")], ["How is Paris?", "And Rome?"]),
    "a greeting": ([assistant("Welcome!"), ASKED], ["Welcome!", "How is Paris?"]),
    "no answer": ([ASKED, assistant(""), user("And Rome?")], ["How is Paris?", "And Rome?"]),
    "reasoning": (
        [ASKED, assistant("Fine.", thought="Hm."), user("And Rome?")],
        ["How is Paris?", "Fine.", "And Rome?"],
    ),
}
WITH_CALLS = {
    "a call": ([ASKED, assistant(None, PARIS), result(0, "sunny")], ["weather", "Paris", "sunny"]),
    "a call beside empty text": (
        [ASKED, assistant("", PARIS), result(0, "sunny")],
        ["weather", "Paris", "sunny"],
    ),
    "a call beside text": (
        [ASKED, assistant("Let me see.", PARIS), result(0, "sunny")],
        ["weather", "Paris", "sunny"],
    ),
    "a call after reasoning": (
        [ASKED, assistant(None, PARIS, thought="Hm."), result(0, "sunny")],
        ["weather", "Paris", "sunny"],
    ),
    "a call beside text after reasoning": (
        [ASKED, assistant("Let me see.", PARIS, thought="Hm."), result(0, "sunny")],
        ["weather", "Paris", "sunny"],
    ),
    "two calls": (
        [ASKED, assistant(None, PARIS, ROME), result(0, "sunny"), result(1, "jammed")],
        ["weather", "Paris", "traffic", "Rome", "sunny", "jammed"],
    ),
    "calls in a row": (
        [ASKED, assistant(None, PARIS), result(0, "sunny"), assistant(None, ROME), result(0, "ok")],
        ["weather", "Paris", "sunny", "traffic", "Rome", "ok"],
    ),
    "a call that was answered": (
        [ASKED, assistant(None, PARIS), result(0, "sunny"), assistant("Sunny."), user("And Rome?")],
        ["weather", "Paris", "sunny", "Sunny.", "And Rome?"],
    ),
    "a question after a result": (
        [ASKED, assistant(None, PARIS), result(0, "sunny"), user("And Rome?")],
        ["weather", "Paris", "sunny", "And Rome?"],
    ),
    "a call without a result": (
        [ASKED, assistant(None, PARIS), user("And Rome?")],
        ["weather", "Paris", "And Rome?"],
    ),
    "a result in parts": (
        [ASKED, assistant(None, PARIS), result(0, "sunny", "dry")],
        ["weather", "Paris", "sunny", "dry"],
    ),
    "empty arguments": ([ASKED, assistant(None, ("now", "")), result(0, "noon")], ["now", "noon"]),
    "arguments of nothing": (
        [ASKED, assistant(None, ("now", "{}")), result(0, "noon")],
        ["now", "noon"],
    ),
    "null for arguments": (
        [ASKED, assistant(None, ("now", "null")), result(0, "noon")],
        ["now", "noon"],
    ),
    "arguments cut off": (
        [ASKED, assistant(None, ("weather", '{"city": "Par')), result(0, "invalid")],
        ["weather", "city", "Par", "invalid"],
    ),
    "a list for arguments": (
        [ASKED, assistant(None, ("weather", '["Paris", 7]')), result(0, "invalid")],
        ["weather", "Paris", "7", "invalid"],
    ),
    "a number for arguments": (
        [ASKED, assistant(None, ("weather", "751")), result(0, "invalid")],
        ["weather", "751", "invalid"],
    ),
    "no call before a result": ([ASKED, result(0, "sunny")], ["sunny"]),
}
ODD_TOOLS = {
    "a name alone": Tool("lookup"),
    "no description": Tool("lookup", None, json.dumps(SCHEMA)),
    "no parameters": Tool("lookup", "Looks something up."),
    "no properties": Tool("lookup", "Looks something up.", '{"type": "object"}'),
    "alternatives": Tool(
        "lookup",
        "Looks something up.",
        json.dumps(
            {
                "type": "object",
                "properties": {
                    "city": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "when": {"type": ["string", "null"]},
                    "whatever": {},
                    "anything": True,
                },
            }
        ),
    ),
}


def builder(name: str, fold_messages: bool = True) -> PromptBuilder:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    template = (
        ChatTemplate(SMOLLM2, TOKENS, source)
        if name in FOR_TOOLS_ONLY
        else ChatTemplate(source, TOKENS)
    )
    return PromptBuilder(template, Tokenizer(byte_level()), fold_messages=fold_messages)


@pytest.fixture(scope="module")
def builders() -> dict[str, PromptBuilder]:
    return {name: builder(name) for name in TEMPLATES if name not in UNUSABLE}


def test_all_files_were_downloaded() -> None:
    """If this fails, fetch them with `make templates`."""
    assert 70 == len(TEMPLATES)
    assert set(TEMPLATES) >= UNUSABLE.keys() | FOR_TOOLS_ONLY


def check(prompt: str, words: list[str]) -> None:
    """Checks that all of these words are there, and no null printed by Python."""
    assert [] == [word for word in words if word not in prompt], prompt
    assert "None" not in prompt


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in UNUSABLE])
@pytest.mark.parametrize("conversation", PLAIN)
def test_conversations(name: str, conversation: str, builders: dict[str, PromptBuilder]) -> None:
    """No message's text is lost."""
    messages, words = PLAIN[conversation]
    check(builders[name].build(Conversation(tuple(messages))).text, words)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in UNUSABLE])
@pytest.mark.parametrize("conversation", WITH_CALLS)
@pytest.mark.parametrize("tools", [TOOLS, ()], ids=["tools", "no tools"])
def test_calls(
    name: str, conversation: str, tools: tuple[Tool, ...], builders: dict[str, PromptBuilder]
) -> None:
    """Calls and results are shown, even if the tools are no longer offered."""
    messages, words = WITH_CALLS[conversation]
    if (name, conversation) in LEFT_OUT:
        words = []
    check(builders[name].build(Conversation(tuple(messages), tools)).text, words)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in UNUSABLE])
@pytest.mark.parametrize("tool", ODD_TOOLS)
def test_tools(name: str, tool: str, builders: dict[str, PromptBuilder]) -> None:
    """Tools are shown, whatever their definitions omit."""
    check(builders[name].build(Conversation((ASKED,), (ODD_TOOLS[tool],))).text, ["lookup"])


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_templates_are_refused(name: str) -> None:
    """The error has the reason, and a model with such a template is not loaded."""
    with pytest.raises(ServiceError, match=UNUSABLE[name]):
        builder(name).build(Conversation((ASKED,)))
