"""Between protobuf and the plain values of this stage. Judges nothing."""

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import Message as ProtobufMessage
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from tokenizer_svc.completion import WholeAnswer
from tokenizer_svc.events import (
    Alternative,
    Delta,
    Event,
    FinishReason,
    Header,
    TokenLogprob,
    Usage,
)
from tokenizer_svc.generation import (
    Ending,
    Finished,
    GeneratorInfo,
    Logprobs,
    Start,
    Update,
)
from tokenizer_svc.models import Model
from tokenizer_svc.request import ChatRequest, Message, Role, Sampling, ToolCall
from trivium.chat.v1 import chat_pb2, model_pb2
from trivium.generator.v1 import generator_pb2
from trivium.generator.v1.generator_pb2_grpc import GeneratorServiceStub as GeneratorStub
from trivium.wire.errors import ServiceError

__all__ = ["GeneratorStub", "HealthStub"]

Value = TypeVar("Value")

_GENERATOR_SERVICE = "trivium.generator.v1.GeneratorService"

_ROLES = {
    chat_pb2.ROLE_SYSTEM: Role.SYSTEM,
    chat_pb2.ROLE_DEVELOPER: Role.DEVELOPER,
    chat_pb2.ROLE_USER: Role.USER,
    chat_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
    chat_pb2.ROLE_TOOL: Role.TOOL,
}
_ENDINGS = {
    generator_pb2.FINISH_REASON_STOP_TOKEN: Ending.STOP_TOKEN,
    generator_pb2.FINISH_REASON_LENGTH: Ending.LENGTH,
    generator_pb2.FINISH_REASON_STOPPED: Ending.STOPPED,
}
_FINISH_REASONS = {
    None: chat_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: chat_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: chat_pb2.FINISH_REASON_LENGTH,
}
_SAMPLING_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


# Fields of the protocol that this stage cannot honour; they are refused, never dropped.
_UNSUPPORTED = frozenset(
    (
        "response_format",
        "structured_outputs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "chat_template_kwargs",
        "continue_final_message",
        "add_generation_prompt",
        "stop_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
    )
)


def refuse_unsupported(request: ProtobufMessage) -> None:
    """Raises ServiceError unsupported_parameter for a field that is not supported."""
    for field, _ in request.ListFields():
        if field.name in _UNSUPPORTED:
            message = f"Unsupported parameter: '{field.name}' is not supported."
            raise ServiceError("unsupported_parameter", message, field.name)


def chat_request(request: chat_pb2.CreateChatCompletionRequest) -> ChatRequest:
    """What the caller wrote, absent fields as None."""
    refuse_unsupported(request)
    given = {name: getattr(request, name) for name in _SAMPLING_SCALARS if request.HasField(name)}

    def optional(name: str, value: Value) -> Value | None:
        return value if request.HasField(name) else None

    return ChatRequest(
        model=request.model,
        messages=chat_messages(request.messages),
        sampling=Sampling(**given, logit_bias=dict(request.logit_bias)),
        max_completion_tokens=optional("max_completion_tokens", request.max_completion_tokens),
        min_tokens=optional("min_tokens", request.min_tokens),
        ignore_eos=optional("ignore_eos", request.ignore_eos),
        stop=tuple(request.stop),
        n=optional("n", request.n),
        logprobs=optional("logprobs", request.logprobs),
        top_logprobs=optional("top_logprobs", request.top_logprobs),
    )


def chat_messages(messages: Iterable[chat_pb2.ChatMessage]) -> tuple[Message, ...]:
    """The conversation; roles and parts that we do not know become None."""
    return tuple(
        Message(
            role=_ROLES.get(message.role),
            parts=tuple(part.text if part.HasField("text") else None for part in message.content),
            name=message.name if message.HasField("name") else None,
            tool_calls=tuple(
                ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls
            ),
            tool_call_id=message.tool_call_id if message.HasField("tool_call_id") else None,
        )
        for message in messages
    )


def start_command(start: Start) -> generator_pb2.GenerateRequest:
    """The first message to the generator."""
    request = start.request
    given = {
        name: value
        for name in _SAMPLING_SCALARS
        if (value := getattr(request.sampling, name)) is not None
    }
    command = generator_pb2.StartGeneration(
        revision=start.revision,
        prompt_token_ids=start.token_ids,
        sampling=generator_pb2.SamplingParams(
            **given, logit_bias=dict(request.sampling.logit_bias)
        ),
        n=request.n,
        max_new_tokens=start.max_new_tokens,
        min_new_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        top_logprobs=request.top_logprobs,
    )
    return generator_pb2.GenerateRequest(start=command)


def stop_command(index: int) -> generator_pb2.GenerateRequest:
    """A later message to the generator: this continuation's text is complete."""
    return generator_pb2.GenerateRequest(stop=generator_pb2.StopSequence(index=index))


def updates(response: generator_pb2.GenerateResponse) -> list[Update]:
    """What the generator says."""
    return [
        Update(
            index=update.index,
            token_ids=tuple(update.token_ids),
            logprobs=tuple(
                Logprobs(
                    entry.logprob, tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True))
                )
                for entry in update.logprobs
            ),
            finished=_finished(update.finished) if update.HasField("finished") else None,
        )
        for update in response.updates
    ]


def _finished(finished: generator_pb2.Finished) -> Finished:
    return Finished(
        ending=_ENDINGS[finished.reason],
        completion_tokens=finished.completion_tokens,
        cached_prompt_tokens=finished.cached_prompt_tokens,
        device_nanoseconds=finished.device_nanoseconds,
    )


def generator_health_request() -> health_pb2.HealthCheckRequest:
    """Asks whether the generator serves."""
    return health_pb2.HealthCheckRequest(service=_GENERATOR_SERVICE)


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    """What a health service says."""
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def generator_info_request() -> generator_pb2.GetModelInfoRequest:
    """Asks what a generator serves."""
    return generator_pb2.GetModelInfoRequest()


def generator_info(response: generator_pb2.GetModelInfoResponse) -> GeneratorInfo:
    """What a generator serves."""
    return GeneratorInfo(response.revision, response.context_length)


def stream_response(event: Event) -> chat_pb2.StreamChatCompletionResponse:
    """One event of a stream."""
    if isinstance(event, Header):
        return chat_pb2.StreamChatCompletionResponse(header=_header(event))
    if isinstance(event, Usage):
        return chat_pb2.StreamChatCompletionResponse(usage=_usage(event))
    return chat_pb2.StreamChatCompletionResponse(delta=_delta(event))


def whole_response(answer: WholeAnswer) -> chat_pb2.CreateChatCompletionResponse:
    """The unary call's answer, choices by index."""
    assert answer.header is not None, "A stream had no header. This is a bug."
    assert answer.usage is not None, "A stream had no usage. This is a bug."
    choices = [
        chat_pb2.Choice(
            index=index,
            content=choice.content,
            logprobs=map(_logprob, choice.logprobs),
            finish_reason=_FINISH_REASONS[choice.finish_reason],
            matched_stop=choice.matched_stop,
        )
        for index, choice in sorted(answer.choices.items())
    ]
    return chat_pb2.CreateChatCompletionResponse(
        header=_header(answer.header), choices=choices, usage=_usage(answer.usage)
    )


def model(model: Model, context_length: int) -> model_pb2.Model:
    """A model that is served."""
    return model_pb2.Model(
        id=model.id,
        create_time=_timestamp(model.created),
        owned_by="trivium",
        context_length=context_length,
        revision=model.revision,
    )


def _header(header: Header) -> chat_pb2.CompletionHeader:
    return chat_pb2.CompletionHeader(
        id=header.id,
        create_time=_timestamp(header.created),
        model=header.model,
        system_fingerprint=header.fingerprint,
        prompt_tokens=header.prompt_tokens,
    )


def _delta(delta: Delta) -> chat_pb2.ChoiceDelta:
    return chat_pb2.ChoiceDelta(
        index=delta.index,
        content=delta.content,
        logprobs=map(_logprob, delta.logprobs),
        completion_tokens=delta.completion_tokens,
        finish_reason=_FINISH_REASONS[delta.finish_reason],
        matched_stop=delta.matched_stop,
    )


def _logprob(entry: TokenLogprob) -> chat_pb2.TokenLogprob:
    return chat_pb2.TokenLogprob(
        token=entry.token,
        logprob=entry.logprob,
        token_bytes=entry.token_bytes,
        top_logprobs=map(_alternative, entry.top),
    )


def _alternative(entry: Alternative) -> chat_pb2.TopLogprob:
    return chat_pb2.TopLogprob(
        token=entry.token, logprob=entry.logprob, token_bytes=entry.token_bytes
    )


def _usage(usage: Usage) -> chat_pb2.Usage:
    return chat_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        device_nanoseconds=usage.device_nanoseconds,
    )


def _timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
