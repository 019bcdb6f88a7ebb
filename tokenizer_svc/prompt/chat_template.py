"""A model's chat template, with Hugging Face's semantics; the only module that imports jinja2.

The sandbox protects the process's objects, but does not limit time and memory: templates come from
the operator's model folder only. Templates may modify lists and dictionaries, as Kimi's does with a
list of its own.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from trivium.wire.errors import ServiceError

# What a template can raise when messages are not what it expects. Anything else is a bug.
_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class ChatTemplateError(ValueError):
    """The model folder's chat template cannot be used; the message says why."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. `render` may be called from any thread.

    `tool_source` is the template for conversations with tools, if it is a different one. A base
    model has no template: `source` is None, it `is_missing`, and all conversations are refused.
    """

    def __init__(
        self, source: str | None, tokens: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        self.is_missing = source is None
        source = source or ""
        environment = SandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(tool_source or source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"line {error.lineno}: {error.message}") from error
        self._tokens = dict(tokens)
        self.source = source
        self.whole_source = source + (tool_source or "")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str | None) -> "ChatTemplate":
        """From tokenizer_config.json; `source` is chat_template.jinja, which takes precedence."""
        if not isinstance(config, Mapping):
            raise ChatTemplateError("tokenizer_config.json is not an object")
        tool_source = None
        if source is None:
            source, tool_source = _from_tokenizer_config(config)
        return cls(source, _token_names(config), tool_source)

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """bos_token and the like, where defined."""
        return self._tokens

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt, up to where the assistant's answer begins.

        The template may modify messages and tools: pass new objects each time. Raises ServiceError
        invalid_chat_template_input if the template refuses the messages.
        """
        if self.is_missing:
            message = "This model has no chat template; send a prompt to /v1/completions."
            raise ServiceError("invalid_chat_template_input", message, "messages")
        template = self._template if tools is None else self._tool_template
        try:
            return template.render(
                **{
                    **self._tokens,
                    **variables,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _REFUSALS as error:
            message = f"The model's chat template refuses the messages: {error}"
            raise ServiceError("invalid_chat_template_input", message, "messages") from error


def _from_tokenizer_config(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The template, and the separate one for requests with tools if there is one."""
    template, tool_template = config.get("chat_template"), None
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template, tool_template = by_name.get("default"), by_name.get("tool_use")
        if template is None:
            raise ChatTemplateError("tokenizer_config.json has several, and no default")
    if not isinstance(template, str | None):
        raise ChatTemplateError("in tokenizer_config.json it is not a string")
    return template, tool_template


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, each given as a string or as an object with `content`."""
    names = {}
    for key in _NAMED_TOKENS:
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            names[key] = value
    return names


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - the date where the model runs


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, does not escape HTML. Iterators of `map` and `select` become lists."""
    return json.dumps(
        list(value) if isinstance(value, Iterator) else value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
