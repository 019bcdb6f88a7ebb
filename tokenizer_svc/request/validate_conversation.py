"""Validates a chat template's input: messages, tools, variables, and how the answer begins.

Raises ServiceError as `validate` does. The template may still refuse it.
"""

import json
from collections.abc import Iterator

from tokenizer_svc.request.field_checks import is_deeper
from tokenizer_svc.request.types import Conversation, Message, Role
from tokenizer_svc.request.validate_tools import check_tools
from trivium.field_errors import check_nonempty, missing, unknown_value
from trivium.json_size import JsonSize, TooManyValues
from trivium.wire.errors import ServiceError

MAX_VARIABLE_DEPTH = 64
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high")


def check_conversation(conversation: Conversation) -> None:
    """Raises ServiceError for the first error, if there is one."""
    check_nonempty("messages", conversation.messages)
    _check_json_size(conversation)
    for index, message in enumerate(conversation.messages):
        _check_message(message, f"messages[{index}]")
    check_tools(conversation.tools)
    if conversation.reasoning_effort not in (None, *REASONING_EFFORTS):
        values = ", ".join(f"'{effort}'" for effort in REASONING_EFFORTS)
        raise unknown_value("reasoning_effort", values)
    for name, value in conversation.variables.items():
        _check_json(f"chat_template_kwargs.{name}", value)
    if conversation.continue_final_message:
        _check_continuation(conversation)


def _check_json_size(conversation: Conversation) -> None:
    """All JSON that is parsed for the template must together fit the limits of a REST body."""
    size = JsonSize()
    for field, text in _json_texts(conversation):
        try:
            size.add(text.encode("utf-8", "replace"))
        except TooManyValues as excess:
            message = f"Invalid '{field}': with what is before it, the request has {excess}."
            raise ServiceError("invalid_value", message, field) from None
        except ValueError as error:
            raise ServiceError("invalid_value", f"Invalid '{field}': {error}.", field) from None


def _json_texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    for index, message in enumerate(conversation.messages):
        for number, call in enumerate(message.tool_calls):
            yield f"messages[{index}].tool_calls[{number}].function.arguments", call.arguments
    for index, tool in enumerate(conversation.tools):
        yield f"tools[{index}].function.parameters", tool.parameters or ""
    for name, value in conversation.variables.items():
        yield f"chat_template_kwargs.{name}", value


def _check_message(message: Message, where: str) -> None:
    if message.role is None:
        roles = ", ".join(f"'ROLE_{role.name}'" for role in Role)
        raise unknown_value(f"{where}.role", roles)
    for index, part in enumerate(message.parts):
        if part is None:
            field = f"{where}.content[{index}]"
            raise ServiceError(
                "invalid_value", f"Invalid '{field}': only text is supported.", field
            )
    if not message.parts and message.role is not Role.ASSISTANT:
        raise missing(f"{where}.content")
    if message.role is Role.TOOL and not message.tool_call_id:
        raise missing(f"{where}.tool_call_id")
    if message.tool_calls and message.role is not Role.ASSISTANT:
        text = f"Invalid '{where}.tool_calls': only assistant messages have tool calls."
        raise ServiceError("invalid_value", text, f"{where}.tool_calls")
    for index, call in enumerate(message.tool_calls):
        if not call.name:
            raise missing(f"{where}.tool_calls[{index}].function.name")


def _check_json(field: str, text: str) -> None:
    try:
        is_right = not is_deeper(json.loads(text), MAX_VARIABLE_DEPTH)
    except (ValueError, RecursionError):
        is_right = False
    if not is_right:
        message = f"Invalid '{field}': not JSON, or nested too deeply."
        raise ServiceError("invalid_value", message, field)


def _check_continuation(conversation: Conversation) -> None:
    field = "continue_final_message"
    if conversation.add_generation_prompt:
        message = "'continue_final_message' and 'add_generation_prompt' cannot both be true."
        raise ServiceError("invalid_parameter_combination", message, field)
    last = conversation.messages[-1]
    if last.role is not Role.ASSISTANT or last.tool_calls or not (last.content or "").strip():
        message = (
            "'continue_final_message' needs the last message to be the assistant's, with text."
        )
        raise ServiceError("invalid_parameter_combination", message, field)
