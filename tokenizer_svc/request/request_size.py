"""Limits the number of elements of a request's fields, before anything is converted.

All it knows about protobuf is that a repeated field has a length.
"""

from typing import Any

from trivium.field_errors import check_array, too_many, too_many_entries
from trivium.limits import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_CONTENT_PARTS,
    MAX_LOGIT_BIASES,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TEMPLATE_VARIABLES,
    MAX_TOKEN_IDS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
)


def check_chat_size(request: Any) -> None:
    """Raises ServiceError for the first field of a chat completion that has too many elements."""
    check_conversation_size(request)
    _check_options(request.options)


def check_conversation_size(request: Any) -> None:
    """The same for the input of a chat template."""
    check_array("messages", request.messages, MAX_MESSAGES)
    parts = calls = 0
    for index, message in enumerate(request.messages):
        parts += len(message.content)
        calls += len(message.tool_calls)
        if parts > MAX_CONTENT_PARTS:
            raise too_many(f"messages[{index}].content", MAX_CONTENT_PARTS, "content parts")
        if calls > MAX_TOOL_CALLS:
            raise too_many(f"messages[{index}].tool_calls", MAX_TOOL_CALLS, "tool calls")
    check_array("tools", request.tools, MAX_TOOLS)
    _check_map("chat_template_kwargs", request.chat_template_kwargs, MAX_TEMPLATE_VARIABLES)


def check_completion_size(request: Any) -> None:
    """The same for a plain completion."""
    check_array("prompt", request.prompts, MAX_PROMPTS)
    several = len(request.prompts) > 1
    for index, prompt in enumerate(request.prompts):
        field = f"prompt[{index}]" if several else "prompt"
        check_array(field, prompt.token_ids.ids, MAX_TOKEN_IDS)
    _check_options(request.options)


def _check_options(options: Any) -> None:
    _check_map("logit_bias", options.sampling.logit_bias, MAX_LOGIT_BIASES)
    check_array("allowed_token_ids", options.sampling.allowed_token_ids, MAX_ALLOWED_TOKENS)
    check_array("bad_words", options.bad_words, MAX_BAD_WORDS)
    check_array("stop", options.stop, MAX_STOP_STRINGS)
    check_array("stop_token_ids", options.stop_token_ids, MAX_STOP_TOKENS)
    choices = options.structured_outputs.choice.choices
    check_array("structured_outputs.choice", choices, MAX_CHOICES)


def _check_map(field: str, entries: Any, maximum: int) -> None:
    if len(entries) > maximum:
        raise too_many_entries(field, maximum)
