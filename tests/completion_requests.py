"""Requests of the public protocol from flat fields, as in JSON: each goes where it belongs."""

from typing import Any

from trivium.chat.v1 import chat_pb2
from trivium.sampling.v1 import sampling_pb2


def options(**fields: Any) -> chat_pb2.CompletionOptions:
    """The options that chat and plain completions share."""
    drawn = _taken(fields, sampling_pb2.SamplingParams)
    return chat_pb2.CompletionOptions(sampling=sampling_pb2.SamplingParams(**drawn), **fields)


def chat_request(**fields: Any) -> chat_pb2.CreateChatCompletionRequest:
    """A request for a chat completion."""
    own = _taken(fields, chat_pb2.CreateChatCompletionRequest)
    return chat_pb2.CreateChatCompletionRequest(options=options(**fields), **own)


def _taken(fields: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Removes and returns the fields that this kind of message has."""
    return {name: fields.pop(name) for name in kind.DESCRIPTOR.fields_by_name if name in fields}
