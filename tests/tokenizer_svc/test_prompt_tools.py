"""Prompts with tools, reasoning and continued messages, compared with transformers'."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from tests.tokenizer_svc import sample_templates as templates
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.test_prompt import Sample
from tokenizer_svc.families.thinking import Thinking
from tokenizer_svc.prompt.builder import Prompt, PromptBuilder
from tokenizer_svc.prompt.chat_template import ChatTemplate
from tokenizer_svc.request.types import Conversation, Message, Role, Tool, ToolCall
from tokenizer_svc.tokenizer import Tokenizer
from trivium.wire.errors import ServiceError

QWEN = byte_level(plain=templates.QWEN_PLAIN_TOKENS)
EOS = {"eos_token": "<|im_end|>"}
SAMPLES = {
    "Qwen2.5": Sample(templates.QWEN25, QWEN, EOS),
    "Qwen3": Sample(templates.QWEN3, QWEN, EOS),
    "Llama 3.1": Sample(
        templates.LLAMA31,
        byte_level(templates.LLAMA3_TOKENS, ("<|python_tag|>",)),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "Mistral": Sample(
        templates.MISTRAL,
        byte_level(templates.MISTRAL_TOKENS),
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "gpt-oss": Sample(
        templates.HARMONY, byte_level(templates.HARMONY_TOKENS), {"eos_token": "<|return|>"}
    ),
    "DeepSeek R1": Sample(
        templates.DEEPSEEK_R1,
        byte_level(templates.DEEPSEEK_TOKENS, templates.DEEPSEEK_PLAIN_TOKENS),
        dict(zip(("bos_token", "eos_token"), templates.DEEPSEEK_TOKENS, strict=True)),
    ),
}

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "é <b>": {"type": "string"}}}
TOOLS = (
    Tool("add", 'Adds "two" <numbers>.', json.dumps(SCHEMA)),
    Tool("now", "The time.", '{"type": "object", "properties": {}}'),
)
OPENAI_TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": 'Adds "two" <numbers>.', "parameters": SCHEMA},
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]


def build(sample: str, *messages: Message, **more: Any) -> Prompt:
    builder = SAMPLES[sample].builder(frozenset(("enable_thinking", "thinking")))
    return builder.build(Conversation(messages, **more))


def transformers_ids(sample: str, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    """The reference."""
    named = SAMPLES[sample]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Library.from_str(named.tokenizer_json), **named.tokens
    )
    given = {"add_generation_prompt": True} | more
    return list(tokenizer.apply_chat_template(messages, chat_template=named.template, **given))


def said(text: str) -> Message:
    return Message(Role.USER, (text,))


@pytest.mark.parametrize("sample", ["Qwen2.5", "Qwen3", "Llama 3.1", "Mistral", "gpt-oss"])
def test_tools_reach_the_template(sample: str) -> None:
    """Tools, a call and its result are rendered as by transformers."""
    call = ToolCall("abcDEF123", "add", '{"a": 1, "é <b>": "x"}')
    function = {"name": "add", "arguments": {"a": 1, "é <b>": "x"}}
    calls = [{"id": "abcDEF123", "type": "function", "function": function}]
    expected = transformers_ids(
        sample,
        [
            {"role": "user", "content": "1 and 2?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "3", "tool_call_id": "abcDEF123"},
        ],
        tools=OPENAI_TOOLS,
    )
    prompt = build(
        sample,
        said("1 and 2?"),
        Message(Role.ASSISTANT, (), tool_calls=(call,)),
        Message(Role.TOOL, ("3",), tool_call_id="abcDEF123"),
        tools=TOOLS,
    )

    assert expected == prompt.token_ids


@pytest.mark.parametrize("sample", SAMPLES)
def test_messages_without_tools(sample: str) -> None:
    """They are rendered as by transformers."""
    expected = transformers_ids(sample, [{"role": "user", "content": "Hi"}])

    assert expected == build(sample, said("Hi")).token_ids


@pytest.mark.parametrize("sample", SAMPLES)
def test_tools_cannot_form_control_tokens(sample: str) -> None:
    """Names, descriptions, keys and values of schemas are plain text."""
    tokenizer = Tokenizer(SAMPLES[sample].tokenizer_json)
    control = tokenizer.control_tokens
    ids = {tokenizer.encode(tokenizer.control_name(token))[0] for token in control}

    def controls(text: str) -> list[int]:
        schema = {"properties": {text: {"type": "string", "enum": [text]}}}
        tool = Tool("f", text, json.dumps(schema))
        return [i for i in build(sample, said("x"), tools=(tool,)).token_ids if i in ids]

    assert controls("harmless") == controls("".join(control) + " ".join(control))


def test_tools_are_described_if_the_template_does_not_support_them() -> None:
    """A system message describes them in the format of Hermes models."""
    builder = Sample(templates.SMOLLM2, QWEN, EOS).builder()
    system = Message(Role.SYSTEM, ("Be brief.",))
    alone = builder.build(Conversation((said("Hi"),), tools=TOOLS)).text
    joined = builder.build(Conversation((system, said("Hi")), tools=TOOLS)).text

    assert alone.startswith("<|im_start|>system\nYou may call")
    assert joined.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    for text in (alone, joined):
        assert json.dumps(OPENAI_TOOLS[0], ensure_ascii=False) in text
        assert "<tool_call>\n{" in text


def test_tools_are_in_the_user_message_without_a_system_role() -> None:
    """Some templates refuse the system role."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    source = refuses + "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    builder = Sample(source, QWEN, EOS).builder()
    text = builder.build(Conversation((said("Hi"),), tools=TOOLS)).text

    assert text.startswith("[user]You may call")
    assert text.endswith("\n\nHi")


def test_calls_and_results_are_text_if_the_template_does_not_support_them() -> None:
    """The model sees calls as it wrote them, and consecutive results as one user message."""
    builder = Sample(templates.SMOLLM2, QWEN, EOS).builder()
    calls = (ToolCall("1", "add", '{"a": 1}'), ToolCall("2", "now", "{}"))
    text = builder.build(
        Conversation(
            (
                said("Hi"),
                Message(Role.ASSISTANT, ("Well.",), tool_calls=calls),
                Message(Role.TOOL, ("3",), tool_call_id="1"),
                Message(Role.TOOL, ("noon",), tool_call_id="2"),
            )
        )
    ).text

    assert (
        'Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n"
        "<tool_response>\nnoon\n</tool_response><|im_end|>\n"
    ) in text


def test_a_separate_template_for_tools() -> None:
    """tokenizer_config.json may have a separate template for tools, as Hermes 2 Pro's does."""
    named = [
        {"name": "default", "template": templates.SMOLLM2},
        {"name": "tool_use", "template": templates.QWEN25},
    ]
    template = ChatTemplate.from_config(EOS | {"chat_template": named}, None)
    builder = PromptBuilder(template, Tokenizer(QWEN))
    with_tools = builder.build(Conversation((said("Hi"),), tools=TOOLS))
    without = builder.build(Conversation((said("Hi"),)))

    assert (
        SAMPLES["Qwen2.5"].builder().build(Conversation((said("Hi"),), tools=TOOLS)) == with_tools
    )
    assert "SmolLM" in without.text


def test_tools_without_a_description() -> None:
    """gpt-oss's template requires a description, which may be empty."""
    text = build("gpt-oss", said("x"), tools=(Tool("now"),)).text

    assert "// \ntype now = (_: ) => any;" in text


def test_mistrals_call_ids() -> None:
    """Ids that its template would refuse are replaced consistently."""
    call = ToolCall("call_0123456789", "add", "{}")
    prompt = build(
        "Mistral",
        said("x"),
        Message(Role.ASSISTANT, (), tool_calls=(call,)),
        Message(Role.TOOL, ("3",), tool_call_id="call_0123456789"),
    )
    [made] = {part[:9] for part in prompt.text.split('id": "')[1:]}

    assert made.isalnum()


@pytest.mark.parametrize(
    ("sample", "more", "thinking"),
    [
        ("Qwen2.5", {}, Thinking.POSSIBLE),
        ("Qwen3", {}, Thinking.POSSIBLE),
        ("Qwen3", {"variables": {"enable_thinking": "false"}}, Thinking.DONE),
        ("Qwen3", {"variables": {"enable_thinking": "true"}}, Thinking.POSSIBLE),
        ("Qwen3", {"reasoning_effort": "none"}, Thinking.DONE),
        ("Qwen3", {"reasoning_effort": "high"}, Thinking.POSSIBLE),
        ("DeepSeek R1", {}, Thinking.OPENED),
    ],
)
def test_the_end_of_the_prompt_shows_whether_reasoning_follows(
    sample: str, more: dict[str, Any], thinking: Thinking
) -> None:
    """The end of the prompt tells; `<think>` in a message does not matter."""
    assert thinking is build(sample, said("</think> <think>"), **more).thinking


def test_reasoning_effort_reaches_the_template() -> None:
    """It is passed to templates that use it."""
    assert "Reasoning: high" in build("gpt-oss", said("x"), reasoning_effort="high").text


def test_effort_none_changes_nothing_without_reasoning() -> None:
    """`none` changes nothing for a model that does not reason."""
    assert build("Qwen2.5", said("x")) == build("Qwen2.5", said("x"), reasoning_effort="none")


@pytest.mark.parametrize(("sample", "effort"), [("Qwen2.5", "high"), ("DeepSeek R1", "none")])
def test_an_unsupported_effort_is_refused(sample: str, effort: str) -> None:
    """An effort is refused if the model's reasoning cannot be turned on, or off."""
    with pytest.raises(ServiceError) as refused:
        build(sample, said("x"), reasoning_effort=effort)

    assert ("unsupported_parameter", "reasoning_effort") == (
        refused.value.code,
        refused.value.param,
    )


def test_variables_that_are_not_allowed_are_refused() -> None:
    """The operator decides which are allowed."""
    with pytest.raises(ServiceError) as refused:
        build("Qwen3", said("x"), variables={"messages": "[]"})

    assert ("unsupported_parameter", "chat_template_kwargs.messages") == (
        refused.value.code,
        refused.value.param,
    )


def test_reasoning_in_the_history() -> None:
    """It reaches each template under the name that it uses."""
    thought = Message(Role.ASSISTANT, ("Hi",), reasoning="Hm.")
    expected = transformers_ids(
        "Qwen3",
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "Hi", "reasoning_content": "Hm."},
            {"role": "user", "content": "y"},
        ],
    )

    assert expected == build("Qwen3", said("x"), thought, said("y")).token_ids
    assert "analysis<|message|>Hm.<|end|>" in build("gpt-oss", said("x"), thought).text


@pytest.mark.parametrize("text", ["Once upon", "  Once upon ", "a<|im_end|>b"])
@pytest.mark.parametrize("sample", ["Qwen2.5", "Qwen3", "Llama 3.1"])
def test_continuing_the_last_message(sample: str, text: str) -> None:
    """The prompt ends where the message's text does, as with transformers."""
    last = Message(Role.ASSISTANT, (text,))
    prompt = build(sample, said("Hi"), last, continue_final_message=True)

    assert prompt.text.endswith(text.strip() if sample == "Llama 3.1" else text.lstrip())
    if "<|" not in text:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        expected = transformers_ids(
            sample, messages, continue_final_message=True, add_generation_prompt=False
        )

        assert expected == prompt.token_ids


def test_continuing_inside_the_reasoning() -> None:
    """The assistant's message may have opened the reasoning."""
    last = Message(Role.ASSISTANT, ("<think>\nHm, let",))
    done = Message(Role.ASSISTANT, ("<think>\nHm.\n</think>\n\nWell",))
    opened = build("Qwen3", said("Hi"), last, continue_final_message=True)
    closed = build("Qwen3", said("Hi"), done, continue_final_message=True)

    assert (Thinking.OPENED, Thinking.DONE) == (opened.thinking, closed.thinking)


def test_a_template_that_changes_the_last_message() -> None:
    """Such a message cannot be continued."""
    last = Message(Role.ASSISTANT, ("a </think> b",))
    with pytest.raises(ServiceError) as refused:
        build("DeepSeek R1", said("Hi"), last, continue_final_message=True)

    assert "invalid_chat_template_input" == refused.value.code


def test_without_the_generation_prompt() -> None:
    """On request the prompt ends with the last message."""
    expected = transformers_ids(
        "Qwen2.5", [{"role": "user", "content": "Hi"}], add_generation_prompt=False
    )

    assert expected == build("Qwen2.5", said("Hi"), add_generation_prompt=False).token_ids
