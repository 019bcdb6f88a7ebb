"""Converts the messages and tools of a conversation from JSON to protobuf."""

from collections.abc import Iterable

from rest_facade.requests.message import MessageParam
from rest_facade.requests.tool import ToolChoiceParam, ToolParam
from trivium.chat.v1 import chat_pb2

_ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "developer": chat_pb2.ROLE_DEVELOPER,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
    "tool": chat_pb2.ROLE_TOOL,
}
_MODES = {
    "none": chat_pb2.TOOL_CHOICE_MODE_NONE,
    "auto": chat_pb2.TOOL_CHOICE_MODE_AUTO,
    "required": chat_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


def messages(conversation: Iterable[MessageParam]) -> list[chat_pb2.ChatMessage]:
    """The conversation."""
    return [_message(message) for message in conversation]


def _message(message: MessageParam) -> chat_pb2.ChatMessage:
    return chat_pb2.ChatMessage(
        role=_ROLES[message.role],
        content=[chat_pb2.ContentPart(text=part.text) for part in message.content or ()],
        name=message.name,
        tool_calls=[
            chat_pb2.ToolCall(
                id=call.id, name=call.function.name, arguments=call.function.arguments
            )
            for call in message.tool_calls or ()
        ],
        tool_call_id=message.tool_call_id,
        reasoning_content=message.reasoning_text(),
    )


def tools(functions: Iterable[ToolParam] | None) -> list[chat_pb2.Tool]:
    """The functions that the model may call."""
    return [
        chat_pb2.Tool(
            function=chat_pb2.FunctionTool(
                name=tool.function.name,
                description=tool.function.description,
                parameters=tool.function.parameters,
                strict=tool.function.strict,
            )
        )
        for tool in functions or ()
    ]


def tool_choice(choice: ToolChoiceParam | None) -> chat_pb2.ToolChoice | None:
    """Which tools may or must be called; None if unspecified."""
    if choice is None:
        return None
    if choice.function is not None:
        return chat_pb2.ToolChoice(
            mode=chat_pb2.TOOL_CHOICE_MODE_FUNCTION, function_name=choice.function.name
        )
    if choice.allowed_tools is not None:
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return chat_pb2.ToolChoice(
            mode=_MODES[choice.allowed_tools.mode],
            allowed_tools=chat_pb2.AllowedTools(function_names=names),
        )
    return chat_pb2.ToolChoice(mode=_MODES[choice.type])
