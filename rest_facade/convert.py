"""Between the public protobuf and OpenAI's JSON; the one door for generated protobuf code.

Knows nothing of HTTP, SSE or gRPC calls.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub as HealthStub

from rest_facade.answer import (
    ChatCompletion,
    Choice,
    FinishReason,
    Logprobs,
    ModelList,
    ModelObject,
    TokenLogprob,
    Usage,
)
from rest_facade.schema import ChatMessage, ChatRequest
from trivium.chat.v1 import chat_pb2, model_pb2
from trivium.chat.v1.chat_pb2_grpc import ChatServiceStub as ChatServiceStub
from trivium.chat.v1.model_pb2_grpc import ModelServiceStub as ModelServiceStub

CompletionRequest = chat_pb2.CreateChatCompletionRequest
CompletionResponse = chat_pb2.CreateChatCompletionResponse
StreamResponse = chat_pb2.StreamChatCompletionResponse

_ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "developer": chat_pb2.ROLE_DEVELOPER,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
    "tool": chat_pb2.ROLE_TOOL,
}
_FINISH_REASONS: dict[int, FinishReason] = {
    chat_pb2.FINISH_REASON_STOP: "stop",
    chat_pb2.FINISH_REASON_LENGTH: "length",
}
# Fields whose name, type and meaning are the same on both sides.
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "seed",
    "n",
    "logprobs",
    "top_logprobs",
    "user",
)


@dataclass(frozen=True, slots=True)
class Header:
    """What all chunks of a stream say."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new in one choice; `completion_tokens` counts from its start."""

    index: int
    content: str
    logprobs: Logprobs | None
    completion_tokens: int
    finish_reason: FinishReason | None


Event = Header | ChoiceDelta | Usage


def completion_request(request: ChatRequest) -> CompletionRequest:
    """The request as the tokenizer takes it; absent fields stay absent."""
    message = CompletionRequest(
        model=request.model,
        messages=[_message(m) for m in request.messages],
        logit_bias={int(k): v for k, v in (request.logit_bias or {}).items()},
        max_completion_tokens=request.longest_answer(),
        stop=request.stop or (),
        metadata=request.metadata or {},
    )
    for name in _SAME:
        value = getattr(request, name)
        if value is not None:
            setattr(message, name, value)
    if not request.logprobs:  # some clients always send a zero
        message.ClearField("top_logprobs")
    return message


def _message(message: ChatMessage) -> chat_pb2.ChatMessage:
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
    )


def chat_completion(response: CompletionResponse, with_logprobs: bool) -> ChatCompletion:
    """The whole answer."""
    header = response.header
    return ChatCompletion(
        id=header.id,
        object="chat.completion",
        created=header.create_time.seconds,
        model=header.model,
        system_fingerprint=header.system_fingerprint,
        choices=[_choice(choice, with_logprobs) for choice in response.choices],
        usage=_usage(response.usage),
    )


def _choice(choice: chat_pb2.Choice, with_logprobs: bool) -> Choice:
    return Choice(
        index=choice.index,
        message={"role": "assistant", "content": choice.content, "refusal": None},
        logprobs=_logprobs(choice.logprobs) if with_logprobs else None,
        finish_reason=_FINISH_REASONS[choice.finish_reason],
    )


def stream_event(response: StreamResponse) -> Event:
    """One event of a stream; raises ValueError for an empty one."""
    match response.WhichOneof("event"):
        case "delta":
            return _choice_delta(response.delta)
        case "header":
            return _header(response.header)
        case "usage":
            return _usage(response.usage)
    raise ValueError("an event of the stream is empty")


def _header(header: chat_pb2.CompletionHeader) -> Header:
    return Header(
        id=header.id,
        created=header.create_time.seconds,
        model=header.model,
        system_fingerprint=header.system_fingerprint,
        prompt_tokens=header.prompt_tokens,
    )


def _choice_delta(delta: chat_pb2.ChoiceDelta) -> ChoiceDelta:
    return ChoiceDelta(
        index=delta.index,
        content=delta.content,
        logprobs=_logprobs(delta.logprobs) if delta.logprobs else None,
        completion_tokens=delta.completion_tokens,
        finish_reason=_FINISH_REASONS.get(delta.finish_reason),
    )


def _logprobs(tokens: Iterable[chat_pb2.TokenLogprob]) -> Logprobs:
    return Logprobs(content=[_token_logprob(token) for token in tokens], refusal=None)


def _token_logprob(token: chat_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token=token.token,
        logprob=token.logprob,
        bytes=list(token.token_bytes),
        top_logprobs=[
            {"token": top.token, "logprob": top.logprob, "bytes": list(top.token_bytes)}
            for top in token.top_logprobs
        ],
    )


def _usage(usage: chat_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        gpu_seconds=usage.device_nanoseconds / 1e9,
        prompt_tokens_details={"cached_tokens": usage.cached_prompt_tokens, "audio_tokens": 0},
        completion_tokens_details={
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    )


def models_request() -> model_pb2.ListModelsRequest:
    """Asks for all models."""
    return model_pb2.ListModelsRequest()


def model_request(model: str) -> model_pb2.GetModelRequest:
    """Asks for one model."""
    return model_pb2.GetModelRequest(id=model)


def model_list(response: model_pb2.ListModelsResponse) -> ModelList:
    """All models."""
    return ModelList(object="list", data=[model_object(model) for model in response.models])


def model_object(model: model_pb2.Model) -> ModelObject:
    """One model."""
    return ModelObject(
        id=model.id,
        object="model",
        created=model.create_time.seconds,
        owned_by=model.owned_by,
        context_length=model.context_length,
        max_model_len=model.context_length,
    )


def health_request(service: str) -> health_pb2.HealthCheckRequest:
    """Asks whether `service` is being served."""
    return health_pb2.HealthCheckRequest(service=service)


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    """Whether the service asked about is being served."""
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
