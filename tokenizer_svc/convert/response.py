"""Converts events and whole completions to protobuf."""

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from tokenizer_svc.output.completion import WholeChoice, WholeCompletion
from tokenizer_svc.output.events import (
    Alternative,
    CallDelta,
    Delta,
    Event,
    FinishReason,
    Header,
    RankedToken,
    TokenLogprob,
    Usage,
)
from trivium.chat.v1 import chat_pb2, completion_pb2

FINISH_REASONS = {
    None: chat_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: chat_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: chat_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: chat_pb2.FINISH_REASON_TOOL_CALLS,
}


def stream_response(event: Event) -> chat_pb2.StreamChatCompletionResponse:
    """One event of a stream."""
    if isinstance(event, Header):
        return chat_pb2.StreamChatCompletionResponse(header=_header(event))
    if isinstance(event, Usage):
        return chat_pb2.StreamChatCompletionResponse(usage=_usage(event))
    return chat_pb2.StreamChatCompletionResponse(delta=_delta(event))


def whole_response(answer: WholeCompletion) -> chat_pb2.CreateChatCompletionResponse:
    """The unary call's response, with choices ordered by index."""
    assert answer.header is not None, "A stream had no header. This is a bug."
    assert answer.usage is not None, "A stream had no usage. This is a bug."
    choices = [
        chat_pb2.Choice(
            index=index,
            content=choice.content,
            logprobs=map(_logprob, choice.logprobs),
            finish_reason=FINISH_REASONS[choice.finish_reason],
            matched_stop=choice.matched_stop,
            reasoning_content=choice.reasoning,
            tool_calls=(
                chat_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
                for call in choice.calls
            ),
            token_ids=choice.token_ids,
        )
        for index, choice in sorted(answer.choices.items())
    ]
    return chat_pb2.CreateChatCompletionResponse(
        header=_header(answer.header),
        choices=choices,
        usage=_usage(answer.usage),
        prompt_logprobs=map(_prompt_position, answer.choices[0].prompt_logprobs),
    )


def completion_event(event: Event) -> completion_pb2.StreamCompletionResponse:
    """One event of a plain completion's stream."""
    if isinstance(event, Header):
        return completion_pb2.StreamCompletionResponse(header=_header(event))
    if isinstance(event, Usage):
        return completion_pb2.StreamCompletionResponse(usage=_usage(event))
    delta = completion_pb2.CompletionDelta(
        index=event.index,
        text=event.content,
        logprobs=map(_placed_logprob, event.logprobs),
        finish_reason=FINISH_REASONS[event.finish_reason],
        matched_stop=event.matched_stop,
        completion_tokens=event.completion_tokens,
    )
    if event.token_ids:
        delta.token_ids.extend(event.token_ids)
    return completion_pb2.StreamCompletionResponse(delta=delta)


def whole_completion(answer: WholeCompletion) -> completion_pb2.CreateCompletionResponse:
    """The unary call's response for a plain completion, with choices ordered by index."""
    assert answer.header is not None, "A stream had no header. This is a bug."
    assert answer.usage is not None, "A stream had no usage. This is a bug."
    return completion_pb2.CreateCompletionResponse(
        header=_header(answer.header),
        choices=(
            _completion_choice(index, choice) for index, choice in sorted(answer.choices.items())
        ),
        usage=_usage(answer.usage),
    )


def _completion_choice(index: int, choice: WholeChoice) -> completion_pb2.CompletionChoice:
    return completion_pb2.CompletionChoice(
        index=index,
        text=choice.content,
        logprobs=map(_placed_logprob, choice.logprobs),
        finish_reason=FINISH_REASONS[choice.finish_reason],
        matched_stop=choice.matched_stop,
        token_ids=choice.token_ids,
        prompt_logprobs=map(_prompt_position, choice.prompt_logprobs),
    )


def _prompt_position(tokens: Iterable[RankedToken]) -> chat_pb2.PromptPosition:
    return chat_pb2.PromptPosition(
        tokens=(
            chat_pb2.PromptLogprob(
                token_id=token.token_id, token=token.token, logprob=token.logprob, rank=token.rank
            )
            for token in tokens
        )
    )


def _placed_logprob(entry: TokenLogprob) -> completion_pb2.CompletionTokenLogprob:
    token = None if entry.is_unscored else _logprob(entry)
    return completion_pb2.CompletionTokenLogprob(token=token, text_offset=entry.offset)


def _header(header: Header) -> chat_pb2.CompletionHeader:
    return chat_pb2.CompletionHeader(
        id=header.id,
        create_time=timestamp(header.created),
        model=header.model,
        system_fingerprint=header.fingerprint,
        prompt_tokens=header.prompt_tokens,
        prompts=(chat_pb2.PromptTokens(ids=token_ids) for token_ids in header.prompts),
    )


def _delta(delta: Delta) -> chat_pb2.ChoiceDelta:
    message = chat_pb2.ChoiceDelta(
        index=delta.index,
        content=delta.content,
        logprobs=map(_logprob, delta.logprobs),
        completion_tokens=delta.completion_tokens,
        finish_reason=FINISH_REASONS[delta.finish_reason],
        matched_stop=delta.matched_stop,
        reasoning_content=delta.reasoning,
        tool_calls=map(_call_delta, delta.calls),
    )
    if delta.token_ids:
        message.token_ids.extend(delta.token_ids)
    return message


def _call_delta(delta: CallDelta) -> chat_pb2.ToolCallDelta:
    return chat_pb2.ToolCallDelta(
        index=delta.index, id=delta.id, name=delta.name, arguments=delta.arguments
    )


def _logprob(entry: TokenLogprob) -> chat_pb2.TokenLogprob:
    return chat_pb2.TokenLogprob(
        token=entry.token,
        logprob=entry.logprob,
        bytes=entry.token_bytes,
        top_logprobs=map(_alternative, entry.top),
    )


def _alternative(entry: Alternative) -> chat_pb2.TopLogprob:
    return chat_pb2.TopLogprob(token=entry.token, logprob=entry.logprob, bytes=entry.token_bytes)


def _usage(usage: Usage) -> chat_pb2.Usage:
    return chat_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        device_nanoseconds=usage.device_nanoseconds,
        reasoning_tokens=usage.reasoning_tokens,
    )


def timestamp(seconds: float) -> Timestamp:
    """Converts a Unix time in seconds."""
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
