"""Chat completions: the request to protobuf, answers and events from it."""

from collections.abc import Iterable
from dataclasses import dataclass

from rest_facade.convert import envelope, message
from rest_facade.convert.envelope import FINISH_REASONS, Header
from rest_facade.requests.chat import ChatRequest
from rest_facade.responses import (
    ChatCompletion,
    Choice,
    FinishReason,
    Logprobs,
    Message,
    TokenLogprob,
    ToolCall,
    Usage,
)
from trivium.chat.v1 import chat_pb2
from trivium.chat.v1.chat_pb2_grpc import ChatServiceStub as ChatServiceStub

Request = chat_pb2.CreateChatCompletionRequest
Response = chat_pb2.CreateChatCompletionResponse
StreamResponse = chat_pb2.StreamChatCompletionResponse


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A piece of a tool call; id and name are None but in the call's first piece."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new in one choice; `completion_tokens` counts from its start."""

    index: int
    content: str
    reasoning: str
    tool_calls: tuple[ToolCallPiece, ...]
    logprobs: Logprobs | None
    completion_tokens: int
    finish_reason: FinishReason | None


ChatEvent = Header | ChoiceDelta | Usage


def request(wanted: ChatRequest) -> Request:
    """The request as the tokenizer takes it; absent fields stay absent."""
    asked = Request(
        messages=message.messages(wanted.messages),
        options=envelope.options(wanted),
        tools=message.tools(wanted.tools),
        tool_choice=message.tool_choice(wanted.tool_choice),
        chat_template_kwargs=wanted.chat_template_kwargs or {},
    )
    envelope.copy_scalars(wanted, asked)
    if not wanted.logprobs:  # some clients always send a zero
        asked.ClearField("top_logprobs")
    return asked


def answer(response: Response, wanted: ChatRequest) -> ChatCompletion:
    """The whole answer."""
    header = response.header
    completion = ChatCompletion(
        id=header.id,
        object="chat.completion",
        created=header.create_time.seconds,
        model=header.model,
        system_fingerprint=header.system_fingerprint,
        choices=[_choice(choice, bool(wanted.logprobs)) for choice in response.choices],
        usage=envelope.usage(response.usage),
    )
    if wanted.service_tier is not None:
        completion["service_tier"] = "default"
    return completion


def _choice(choice: chat_pb2.Choice, with_logprobs: bool) -> Choice:
    return Choice(
        index=choice.index,
        message=_message(choice),
        logprobs=_logprobs(choice.logprobs) if with_logprobs else None,
        finish_reason=FINISH_REASONS[choice.finish_reason],
    )


def _message(choice: chat_pb2.Choice) -> Message:
    said = Message(role="assistant", content=choice.content, refusal=None, annotations=[])
    if choice.reasoning_content:
        said["reasoning_content"] = choice.reasoning_content
        said["content"] = choice.content or None
    if choice.tool_calls:
        said["content"] = choice.content or None
        said["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
    return said


def _tool_call(call: chat_pb2.ToolCall) -> ToolCall:
    return ToolCall(
        id=call.id,
        type="function",
        function={"name": call.name, "arguments": call.arguments},
    )


def event(response: StreamResponse) -> ChatEvent:
    """One event of a stream; raises ValueError for an empty one."""
    match response.WhichOneof("event"):
        case "delta":
            return _choice_delta(response.delta)
        case "header":
            return envelope.header(response.header)
        case "usage":
            return envelope.usage(response.usage)
    raise ValueError("an event of the stream is empty")


def _choice_delta(delta: chat_pb2.ChoiceDelta) -> ChoiceDelta:
    return ChoiceDelta(
        index=delta.index,
        content=delta.content,
        reasoning=delta.reasoning_content,
        tool_calls=tuple(map(_piece, delta.tool_calls)) if delta.tool_calls else (),
        logprobs=_logprobs(delta.logprobs) if delta.logprobs else None,
        completion_tokens=delta.completion_tokens,
        finish_reason=FINISH_REASONS.get(delta.finish_reason),
    )


def _piece(call: chat_pb2.ToolCallDelta) -> ToolCallPiece:
    return ToolCallPiece(
        index=call.index,
        id=call.id if call.HasField("id") else None,
        name=call.name if call.HasField("name") else None,
        arguments=call.arguments,
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
