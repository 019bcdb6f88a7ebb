"""Chat completions: requests to protobuf, responses and events from it."""

from collections.abc import Iterable, Iterator

from rest_facade.convert import envelope, message
from rest_facade.convert.chunks import Chunks
from rest_facade.convert.envelope import FINISH_REASONS
from rest_facade.requests.chat import ChatCompletionRequest
from rest_facade.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    FinishReason,
    Logprobs,
    MessageToolCall,
    ToolCallDelta,
)
from trivium.chat.v1 import chat_pb2
from trivium.chat.v1.chat_pb2_grpc import ChatServiceStub as ChatServiceStub

Request = chat_pb2.CreateChatCompletionRequest
Response = chat_pb2.CreateChatCompletionResponse
StreamResponse = chat_pb2.StreamChatCompletionResponse


def request(body: ChatCompletionRequest) -> Request:
    """The request for the tokenizer; absent fields stay absent."""
    request = Request(
        messages=message.messages(body.messages),
        options=envelope.options(body),
        tools=message.tools(body.tools),
        tool_choice=message.tool_choice(body.tool_choice),
        chat_template_kwargs=body.chat_template_kwargs or {},
    )
    envelope.copy_scalars(body, request)
    if not body.logprobs:  # some clients always send 0
        request.ClearField("top_logprobs")
    return request


def answer(response: Response, body: ChatCompletionRequest) -> ChatCompletion:
    """The response to a request without `stream`."""
    header = response.header
    completion = ChatCompletion(
        id=header.id,
        object="chat.completion",
        created=header.create_time.seconds,
        model=header.model,
        system_fingerprint=header.system_fingerprint,
        choices=[_choice(choice, body) for choice in response.choices],
        usage=envelope.usage(response.usage),
    )
    if body.return_token_ids:
        completion["prompt_token_ids"] = list(header.prompts[0].ids)
    if body.prompt_logprobs is not None:
        completion["prompt_logprobs"] = envelope.prompt_logprobs(response.prompt_logprobs)
    if body.service_tier is not None:
        completion["service_tier"] = "default"
    return completion


def _choice(choice: chat_pb2.Choice, body: ChatCompletionRequest) -> Choice:
    result = Choice(
        index=choice.index,
        message=_message(choice),
        logprobs=_logprobs(choice.logprobs) if body.logprobs else None,
        finish_reason=FINISH_REASONS[choice.finish_reason],
    )
    if body.return_token_ids:
        result["token_ids"] = list(choice.token_ids)
    return result


def _message(choice: chat_pb2.Choice) -> ChatCompletionMessage:
    result = ChatCompletionMessage(
        role="assistant", content=choice.content, refusal=None, annotations=[]
    )
    if choice.reasoning_content:
        result["reasoning_content"] = choice.reasoning_content
        result["content"] = choice.content or None
    if choice.tool_calls:
        result["content"] = choice.content or None
        result["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
    return result


def _tool_call(call: chat_pb2.ToolCall) -> MessageToolCall:
    return MessageToolCall(
        id=call.id,
        type="function",
        function={"name": call.name, "arguments": call.arguments},
    )


class ChatChunks(Chunks[ChatCompletionChunk]):
    """The chunks of a streamed chat completion."""

    object = "chat.completion.chunk"

    def _start(self, header: chat_pb2.CompletionHeader) -> None:
        super()._start(header)
        if self._return_token_ids:
            self._head["prompt_token_ids"] = list(header.prompts[0].ids)

    def _choices(self, delta: chat_pb2.ChoiceDelta) -> Iterator[ChunkChoice]:
        index = delta.index
        if index not in self._completion_tokens:
            self._completion_tokens[index] = 0
            # Null if there may never be any content.
            has_other_parts = (delta.tool_calls or delta.reasoning_content) and not delta.content
            yield _chunk_choice(
                index, ChoiceDelta(role="assistant", content=None if has_other_parts else "")
            )
        self._completion_tokens[index] = delta.completion_tokens
        parts = _parts(delta)
        if delta.logprobs and not parts:
            parts = [ChoiceDelta(content="")]
        # Log-probabilities go with the last part that their tokens made.
        for position, part in enumerate(parts, start=1):
            with_logprobs = delta.logprobs and position == len(parts)
            yield _chunk_choice(index, part, _logprobs(delta.logprobs) if with_logprobs else None)
        if delta.finish_reason:
            yield _chunk_choice(
                index, ChoiceDelta(), finish_reason=FINISH_REASONS[delta.finish_reason]
            )

    def _choices_with_ids(self, delta: chat_pb2.ChoiceDelta) -> Iterator[ChunkChoice]:
        token_ids = list(delta.token_ids)
        for choice in self._choices(delta):
            if "role" in choice["delta"]:
                yield choice
                self._head.pop("prompt_token_ids", None)  # which only the first chunk has
                continue
            choice["token_ids"], token_ids = token_ids, []
            yield choice
        if token_ids:
            choice = _chunk_choice(delta.index, ChoiceDelta())
            choice["token_ids"] = token_ids
            yield choice


def _chunk_choice(
    index: int,
    delta: ChoiceDelta,
    logprobs: Logprobs | None = None,
    finish_reason: FinishReason | None = None,
) -> ChunkChoice:
    return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


def _parts(delta: chat_pb2.ChoiceDelta) -> list[ChoiceDelta]:
    """The parts of a delta, each of which becomes a chunk of its own."""
    parts = []
    if delta.reasoning_content:
        parts.append(ChoiceDelta(reasoning_content=delta.reasoning_content))
    if delta.content:
        parts.append(ChoiceDelta(content=delta.content))
    for call in delta.tool_calls:
        if call.HasField("id"):
            parts.append(ChoiceDelta(tool_calls=[_first_fragment(call)]))
        if call.arguments:
            arguments = ToolCallDelta(index=call.index, function={"arguments": call.arguments})
            parts.append(ChoiceDelta(tool_calls=[arguments]))
    return parts


def _first_fragment(call: chat_pb2.ToolCallDelta) -> ToolCallDelta:
    """The first fragment of a call; arguments follow in separate chunks, as with OpenAI."""
    return ToolCallDelta(
        index=call.index,
        id=call.id,
        type="function",
        function={"name": call.name, "arguments": ""},
    )


def _logprobs(tokens: Iterable[chat_pb2.TokenLogprob]) -> Logprobs:
    return Logprobs(content=[_token_logprob(token) for token in tokens], refusal=None)


def _token_logprob(token: chat_pb2.TokenLogprob) -> ChatCompletionTokenLogprob:
    return ChatCompletionTokenLogprob(
        token=token.token,
        logprob=token.logprob,
        bytes=list(token.bytes),
        top_logprobs=[
            {"token": top.token, "logprob": top.logprob, "bytes": list(top.bytes)}
            for top in token.top_logprobs
        ],
    )
