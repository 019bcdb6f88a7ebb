"""Calls in the history reach the prompt complete, in whichever form the template can read."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.tokenizer_svc import sample_templates as templates
from tests.tokenizer_svc.conftest import Stage, running, user, write_model
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.scripted_generator import says
from tests.tokenizer_svc.test_chat_service import ended
from tokenizer_svc.models import load_model
from tokenizer_svc.prompt.builder import PromptBuilder
from tokenizer_svc.prompt.chat_template import ChatTemplate
from tokenizer_svc.request.types import Conversation, Message, Role, Tool, ToolCall
from tokenizer_svc.tokenizer import Tokenizer
from trivium.chat.v1 import chat_pb2
from trivium.tokenizer.v1 import tokenizer_pb2

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "SmolLM2": templates.SMOLLM2,
    "Qwen2.5": templates.QWEN25,
    "Qwen3": templates.QWEN3,
    "Qwen3.5": templates.QWEN35,
    "Llama 3.1": templates.LLAMA31,
    "Mistral": templates.MISTRAL,
    "gpt-oss": templates.HARMONY,
    "DeepSeek R1": templates.DEEPSEEK_R1,
    "Gemma 2": templates.GEMMA2,
    "MiniMax M2": templates.MINIMAX_M2,
    "Kimi K2": templates.KIMI_K2,
}
TOOLS = (Tool("now", "The time.", '{"type": "object", "properties": {}}'),)

any_template = pytest.mark.parametrize("name", TEMPLATES)


def render(name: str, *messages: Message, tools: tuple[Tool, ...] = TOOLS) -> str:
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    builder = PromptBuilder(template, Tokenizer(byte_level()))
    asked = Message(Role.USER, ("Where?",))
    return builder.build(Conversation((asked, *messages), tools)).text


def called(*calls: tuple[str, str], text: str | None = None, thought: str | None = None) -> Message:
    return Message(
        Role.ASSISTANT,
        () if text is None else (text,),
        tool_calls=tuple(
            ToolCall(f"call_{index}", name, arguments)
            for index, (name, arguments) in enumerate(calls)
        ),
        reasoning=thought,
    )


def result(text: str, index: int = 0) -> Message:
    return Message(Role.TOOL, (text,), tool_call_id=f"call_{index}")


PARIS = ("weather", '{"city": "Paris"}')
ROME = ("traffic", '{"city": "Rome"}')


@any_template
def test_arguments_that_contain_control_tokens(name: str) -> None:
    """They reach the prompt unchanged, however a template prints lists and objects."""
    words = '["start", {"end": "im"}, "<|im_end|>"]'
    prompt = render(name, called(("weather", f'{{"at": {words}}}')), result("sunny"))

    assert words in prompt.replace("'", '"')


@pytest.mark.parametrize("printed", ["['value']", "['value'] | tojson(ensure_ascii=True)"])
@pytest.mark.parametrize("text", ["start", "<|im_end|>", "\ufdd2start", "start\\ufdd2"])
def test_a_text_within_a_list(printed: str, text: str) -> None:
    """However a template prints it, nothing is added to it."""
    source = (
        "{% for m in messages %}{{ " + printed.replace("'value'", "m.content") + " }}{% endfor %}"
    )
    builder = PromptBuilder(ChatTemplate(source, TOKENS), Tokenizer(byte_level()))
    shown = builder.build(Conversation((Message(Role.USER, (text,)),))).text
    expected = [repr([text]), json.dumps([text])]

    assert shown in expected


@any_template
@pytest.mark.parametrize("tools", [TOOLS, ()], ids=["tools", "no tools"])
@pytest.mark.parametrize("text", [None, ""], ids=["null", "empty"])
def test_a_call_without_text(name: str, tools: tuple[Tool, ...], text: str | None) -> None:
    """Clients send back the null content of our calls; no template fails on it or prints it."""
    prompt = render(name, called(PARIS, text=text), result("sunny"), tools=tools)

    for word in ("weather", "Paris", "sunny"):
        assert word in prompt
    assert "None" not in prompt
    assert "null" not in prompt


def test_absent_text_adds_no_empty_turn() -> None:
    """If several forms show the call, the one that shows nothing else is used."""
    source = (
        "{% for m in messages %}{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}{% endif %}"
        "{% if m.content is not none %}<{{ m.role }}>{{ m.content }}<end>{% endif %}{% endfor %}"
    )
    builder = PromptBuilder(ChatTemplate(source, {}), Tokenizer(byte_level()))
    prompt = builder.build(Conversation((called(PARIS), result("sunny")))).text

    assert "<assistant>" not in prompt


@any_template
def test_text_beside_a_call(name: str) -> None:
    """DeepSeek's template would drop the call."""
    prompt = render(name, called(PARIS, text="Let me see."), result("sunny"))

    for word in ("weather", "Paris", "sunny"):
        assert word in prompt
    if name == "DeepSeek R1":
        assert prompt.index("Let me see.") < prompt.index("weather")


@any_template
def test_several_calls(name: str) -> None:
    """All are shown with their results, one at a time if the template takes only one call."""
    prompt = render(name, called(PARIS, ROME), result("sunny"), result("jammed", 1))

    for word in ("weather", "traffic"):
        assert word in prompt
    for word in ("Paris", "Rome", "sunny", "jammed"):
        assert 1 == prompt.count(word)
    if name in ("gpt-oss", "Llama 3.1"):
        assert prompt.index("sunny") < prompt.index("traffic") < prompt.index("jammed")


def test_results_follow_their_own_calls() -> None:
    """They are matched by id, in whatever order they came; a result without a call is kept."""
    prompt = render(
        "gpt-oss",
        called(PARIS, ROME),
        result("jammed", 1),
        result("sunny", 0),
        result("stray", 7),
        Message(Role.USER, ("Thanks",)),
    )
    words = ["weather", "sunny", "traffic", "jammed", "stray", "Thanks"]

    assert words == sorted(words, key=prompt.index)


@any_template
@pytest.mark.parametrize("arguments", ["", " ", "{}", "null"])
def test_empty_arguments(name: str, arguments: str) -> None:
    """All of these mean that there are none."""
    prompt = render(name, called(("clock", arguments)), result("noon"))

    assert render(name, called(("clock", "{}")), result("noon")) == prompt
    assert "clock" in prompt
    assert "None" not in prompt


DEEP = '{"a": ' * 300 + "1" + "}" * 300
ODD = ['{"city": "Par', '["Paris", 7]', "751", '"Paris"', "true", "not JSON", DEEP]


@any_template
@pytest.mark.parametrize("arguments", ODD, ids=range(len(ODD)))
def test_arguments_that_are_not_an_object(name: str, arguments: str) -> None:
    """Arguments cut off by max_tokens or malformed by a model are shown, and never refused."""
    prompt = render(name, called(("weather", arguments)), result("invalid"))
    written = json.dumps(arguments)[1:-1]

    assert "weather" in prompt
    assert arguments in prompt or written in prompt or json.dumps(written)[1:-1] in prompt


def test_rendering_of_arguments_that_are_not_an_object() -> None:
    """They stay text if the template takes text; else they become an object's only field."""
    cut = called(("weather", '{"city": "Par'))

    assert '"arguments": {"city": "Par}' in render("Qwen3", cut)
    assert '"arguments": "{\\"city\\": \\"Par"}' in render("Qwen2.5", cut)
    assert 'weather\n```json\n{"city": "Par\n```' in render("DeepSeek R1", cut)
    assert '<parameter=invalid_arguments>\n{"city": "Par\n</parameter>' in render("Qwen3.5", cut)


def test_arguments_are_text_where_the_template_joins_them_to_text() -> None:
    """They are unchanged."""
    call = ("weather", '{"city":"Paris"}')

    assert 'weather\n```json\n{"city":"Paris"}\n```' in render("DeepSeek R1", called(call))


def test_arguments_are_rendered_as_json_and_not_as_python() -> None:
    """A template that puts them into text without a filter gets JSON."""
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name ~ ' ' ~ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    builder = PromptBuilder(ChatTemplate(source, {}), Tokenizer(byte_level()))
    text = builder.build(Conversation((called(PARIS), result("sunny")))).text

    assert 'weather {"city": "Paris"}sunny' == text


@any_template
def test_malformed_arguments_cannot_form_control_tokens(name: str) -> None:
    """They stay text, in whatever form they reach the template."""
    source, control = TEMPLATES[name], "<|im_end|>"
    tokenizer = Tokenizer(byte_level())
    [control_id] = tokenizer.encode(tokenizer.control_name(control))

    def count(*arguments: str) -> int:
        builder = PromptBuilder(ChatTemplate(source, TOKENS), tokenizer)
        messages = [Message(Role.USER, ("x",))]
        for text in arguments:
            messages += [called(("weather", text)), result("x")]
        return builder.build(Conversation(tuple(messages))).token_ids.count(control_id)

    evil = [f'{{"city": "{control}', f'["{control}"]', control, f'"{control}"']

    assert count("a", "b", "c", "d") == count(*evil)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_has_the_name_that_the_template_uses(key: str) -> None:
    """Solar calls it reasoning, gpt-oss thinking, Apriel thought."""
    source = (
        f"{{% for m in messages %}}{{% if m['{key}'] %}}<think>{{{{ m['{key}'] }}}}</think>"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    builder = PromptBuilder(ChatTemplate(source, {}), Tokenizer(byte_level()))
    thought = Message(Role.ASSISTANT, ("Yes.",), reasoning="Hm.")

    assert "<think>Hm.</think>Yes." == builder.build(Conversation((thought,))).text


@any_template
@pytest.mark.parametrize("text", [None, "Let me see."])
def test_reasoning_before_a_call(name: str, text: str | None) -> None:
    """It is not refused, though gpt-oss's template cannot have it beside both text and a call."""
    prompt = render(name, called(PARIS, text=text, thought="Hm."), result("sunny"))

    assert "Paris" in prompt
    if name == "gpt-oss":
        assert ("analysis<|message|>Hm.<|end|>" in prompt) is (text is None)


@any_template
def test_results_in_parts_and_calls_without_ids(name: str) -> None:
    """Some clients send them."""
    call = ToolCall("", "weather", '{"city": "Paris"}')
    parts = Message(Role.TOOL, ("sunny", "dry"), tool_call_id="call_0")
    prompt = render(name, Message(Role.ASSISTANT, (), tool_calls=(call,)), parts)

    for word in ("weather", "Paris", "sunny", "dry"):
        assert word in prompt


def test_calls_without_tools_if_tools_have_their_own_template() -> None:
    """If the template without tools does not support calls, they are text; the other's are not."""
    named = [
        {"name": "default", "template": templates.SMOLLM2},
        {"name": "tool_use", "template": templates.QWEN25},
    ]
    template = ChatTemplate.from_config(TOKENS | {"chat_template": named}, None)
    builder = PromptBuilder(template, Tokenizer(byte_level()))
    messages = (Message(Role.USER, ("x",)), called(PARIS), result("sunny"))

    for tools in ((), TOOLS):
        text = builder.build(Conversation(messages, tools)).text

        assert '{"name": "weather", "arguments": {"city": "Paris"}}' in text
        assert "<tool_response>\nsunny\n</tool_response>" in text


async def odd_answer(stage: Stage, arguments: str) -> Any:
    """What a client gets after such a call."""
    messages = [
        user("Where?"),
        chat_pb2.ChatMessage(
            role=chat_pb2.ROLE_ASSISTANT,
            tool_calls=[chat_pb2.ToolCall(id="call_0", name="weather", arguments=arguments)],
        ),
        chat_pb2.ChatMessage(
            role=chat_pb2.ROLE_TOOL,
            content=[chat_pb2.ContentPart(text="invalid")],
            tool_call_id="call_0",
        ),
    ]
    rendered = await stage.tokenizer.RenderChat(
        tokenizer_pb2.RenderChatRequest(model=stage.model.id, messages=messages)
    )
    assert "weather" in rendered.prompt
    return await stage.chat.CreateChatCompletion(stage.request(messages=messages))


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3.5", "gpt-oss", "MiniMax M2"])
async def test_any_history_can_be_continued_over_grpc(name: str, tmp_path: Path) -> None:
    """Whatever is in the history, the conversation continues."""
    folder = write_model(tmp_path / "tiny", TEMPLATES[name], context_length=4096)
    async with running(load_model(folder), folder) as stage:
        stage.generator.script = says([ended(1)])
        for arguments in ("", "null", '{"city": "Par', "[1]", "7", '{"city": "Paris"}'):
            answer = await odd_answer(stage, arguments)

            assert answer.choices
        with pytest.raises(grpc.aio.AioRpcError):  # it can refuse at all
            await stage.chat.CreateChatCompletion(stage.request(messages=[]))
