"""Chat templates are interpreted as by Hugging Face's transformers."""

import re
from datetime import datetime
from typing import Any

import pytest

from tests.tokenizer_svc.sample_templates import LLAMA2
from tokenizer_svc.prompt.chat_template import ChatTemplate, ChatTemplateError
from trivium.wire.errors import ServiceError

HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, **tokens: str) -> str:
    return ChatTemplate(source, tokens).render(HELLO)


def test_the_template_file_takes_precedence() -> None:
    """chat_template.jinja wins; without it the template is in tokenizer_config.json."""
    config = {"chat_template": "from config"}

    assert "from file" == ChatTemplate.from_config(config, "from file").render(HELLO)
    assert "from config" == ChatTemplate.from_config(config, None).render(HELLO)


def test_the_default_of_several_templates_is_used() -> None:
    """tokenizer_config.json may have a list of named templates."""
    config = {
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "default"},
        ]
    }

    assert "default" == ChatTemplate.from_config(config, None).render(HELLO)


@pytest.mark.parametrize("config", [{}, {"chat_template": None}])
def test_without_a_template_conversations_are_refused(config: dict[str, Any]) -> None:
    """The error says which endpoint the model can be used with."""
    with pytest.raises(ServiceError, match="send a prompt to /v1/completions") as refused:
        ChatTemplate.from_config(config, None).render(HELLO)

    assert ("invalid_chat_template_input", "messages") == (refused.value.code, refused.value.param)


def test_an_invalid_template_is_an_error() -> None:
    """An invalid template is an error, and so is a list without a default."""
    for template in ([{"name": "rag", "template": "x"}], 5, {"default": "x"}):
        with pytest.raises(ChatTemplateError):
            ChatTemplate.from_config({"chat_template": template}, None)
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("\n{% if %}", {})


def test_named_tokens_are_text_or_objects() -> None:
    """bos_token may be a string or an object; an absent token is undefined."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}"

    assert "<s></s>False" == ChatTemplate.from_config(config, source).render(HELLO)


def test_tojson_escapes_neither_html_nor_unicode() -> None:
    """`tojson` does not escape HTML or non-ASCII characters."""
    assert '{"a": "<é>"}' == render("{{ {'a': '<é>'} | tojson }}")
    assert '{\n  "a": 1\n}' == render("{{ {'a': 1} | tojson(indent=2) }}")


def test_break_and_continue_are_supported() -> None:
    """`break` and `continue` are supported."""
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"

    assert "01" == render(source)


def test_generation_blocks_render_their_body() -> None:
    """They matter only in training."""
    assert "a Hello b" == render("a {% generation %}{{ messages[0].content }}{% endgeneration %} b")


def test_templates_may_mutate_lists() -> None:
    """Kimi's does: it records the ids of calls, and removes them when their results come."""
    assert "b" == render("{% set l = [] %}{% set _ = l.extend(['a', 'b']) %}{{ l.pop() }}")


def test_tojson_accepts_what_map_returns() -> None:
    """`tojson` takes what `map` returns, as in templates that map tools to their functions."""
    assert '["Hello"]' == render("{{ messages | map(attribute='content') | tojson }}")


def test_white_space_around_blocks_is_removed() -> None:
    """White space is removed as with `trim_blocks` and `lstrip_blocks`."""
    assert "x\ny" == render("  {% if true %}\nx\n  {% endif %}\ny")


def test_strftime_now_gives_todays_date() -> None:
    """`strftime_now` gives today's date."""
    assert str(datetime.now().astimezone().year) == render("{{ strftime_now('%Y') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_failing_template_is_the_callers_error(source: str) -> None:
    """A template's failure is the caller's error, and so is hitting the sandbox's limits."""
    with pytest.raises(ServiceError) as refused:
        render(source)

    assert ("invalid_chat_template_input", "messages") == (refused.value.code, refused.value.param)


def test_raise_exception_messages_reach_the_caller() -> None:
    """What a template's author wrote in `raise_exception` is for the caller."""
    with pytest.raises(ServiceError, match=re.escape("roles must alternate")):
        ChatTemplate(LLAMA2, {"bos_token": "<s>"}).render(HELLO * 2)
