"""What chat and plain completions share: a request's options and a response's usage."""

import functools
from collections.abc import Iterable

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from pydantic import BaseModel

from rest_facade.requests.options import SharedOptions
from rest_facade.requests.structured_output import ResponseFormat, StructuredOutputs
from rest_facade.responses import CompletionUsage, FinishReason, PromptLogprob, PromptLogprobs
from trivium.chat.v1 import chat_pb2
from trivium.sampling.v1.sampling_pb2 import SamplingParams

FINISH_REASONS: dict[int, FinishReason] = {
    chat_pb2.FINISH_REASON_STOP: "stop",
    chat_pb2.FINISH_REASON_LENGTH: "length",
    chat_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def options(request: SharedOptions) -> chat_pb2.CompletionOptions:
    """The fields that chat and plain completions share; absent ones stay absent."""
    sampling = SamplingParams(
        logit_bias={int(k): v for k, v in (request.logit_bias or {}).items()},
        allowed_token_ids=request.allowed_token_ids or (),
    )
    copy_scalars(request, sampling)
    message = chat_pb2.CompletionOptions(
        sampling=sampling,
        max_completion_tokens=request.max_tokens_per_choice(),
        stop=request.stop or (),
        stop_token_ids=request.stop_token_ids or (),
        bad_words=request.bad_words or (),
        metadata=request.metadata or {},
    )
    copy_scalars(request, message)
    if request.response_format is not None:
        message.response_format.CopyFrom(_response_format(request.response_format))
    constraint = request.constraint()
    if constraint is not None:
        message.structured_outputs.CopyFrom(_structured_outputs(constraint))
    return message


def copy_scalars(request: BaseModel, message: Message) -> None:
    """Copies the scalar fields that both have by the same name; absent ones stay absent."""
    for name in _scalars(message.DESCRIPTOR):
        value = getattr(request, name, None)
        if value is not None:
            setattr(message, name, value)


@functools.cache
def _scalars(kind: Descriptor) -> tuple[str, ...]:
    return tuple(
        field.name
        for field in kind.fields
        if field.message_type is None and field.enum_type is None and not field.is_repeated
    )


def _response_format(response_format: ResponseFormat) -> chat_pb2.ResponseFormat:
    if response_format.json_schema is not None:
        json_schema = response_format.json_schema
        schema = chat_pb2.JsonSchemaFormat(
            name=json_schema.name,
            description=json_schema.description,
            schema=json_schema.schema_text,
            strict=json_schema.strict,
        )
        return chat_pb2.ResponseFormat(json_schema=schema)
    bare = response_format.bare_schema()
    if bare is not None:
        name, text = bare
        return chat_pb2.ResponseFormat(
            json_schema=chat_pb2.JsonSchemaFormat(name=name, schema=text)
        )
    if response_format.type == "json_object":
        return chat_pb2.ResponseFormat(json_object=chat_pb2.JsonObjectFormat())
    return chat_pb2.ResponseFormat(text=chat_pb2.TextFormat())


def _structured_outputs(constraint: StructuredOutputs) -> chat_pb2.StructuredOutputs:
    if constraint.choice is not None:
        return chat_pb2.StructuredOutputs(choice=chat_pb2.ChoiceList(choices=constraint.choice))
    return chat_pb2.StructuredOutputs(
        json=constraint.json_text,
        regex=constraint.regex,
        grammar=constraint.grammar,
        json_object=constraint.json_object or None,
    )


def prompt_logprobs(positions: Iterable[chat_pb2.PromptPosition]) -> PromptLogprobs:
    """The log-probabilities at each position of a prompt, by token id."""
    return [
        {
            str(token.token_id): PromptLogprob(
                logprob=token.logprob, rank=token.rank, decoded_token=token.token
            )
            for token in position.tokens
        }
        or None
        for position in positions
    ]


def taken(usage: chat_pb2.Usage) -> tuple[int, int]:
    """Prompt and completion tokens, and device time in nanoseconds."""
    return usage.prompt_tokens + usage.completion_tokens, usage.device_nanoseconds


def usage(message: chat_pb2.Usage) -> CompletionUsage:
    """The usage of a request."""
    return CompletionUsage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        total_tokens=message.prompt_tokens + message.completion_tokens,
        gpu_seconds=message.device_nanoseconds / 1e9,
        prompt_tokens_details={"cached_tokens": message.cached_prompt_tokens, "audio_tokens": 0},
        completion_tokens_details={
            "reasoning_tokens": message.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    )
