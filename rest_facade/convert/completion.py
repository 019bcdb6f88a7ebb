"""Plain completions: requests to protobuf, responses and events from it."""

from collections.abc import Iterator, Sequence

from rest_facade.convert import envelope
from rest_facade.convert.chunks import Chunks
from rest_facade.convert.envelope import FINISH_REASONS
from rest_facade.requests.completion import TextCompletionRequest
from rest_facade.responses import (
    PromptLogprobs,
    TextChoice,
    TextChunkChoice,
    TextCompletion,
    TextCompletionChunk,
    TextLogprobs,
)
from trivium.chat.v1 import chat_pb2, completion_pb2
from trivium.chat.v1.completion_pb2_grpc import CompletionServiceStub as CompletionServiceStub

Request = completion_pb2.CreateCompletionRequest
Response = completion_pb2.CreateCompletionResponse
StreamResponse = completion_pb2.StreamCompletionResponse


def request(body: TextCompletionRequest) -> Request:
    """The request for the tokenizer; absent fields stay absent."""
    return Request(
        model=body.model,
        prompts=[_prompt(prompt) for prompt in body.prompt],
        options=envelope.options(body),
        echo=body.echo,
        logprobs=body.logprobs,
        add_special_tokens=body.add_special_tokens,
    )


def _prompt(prompt: str | list[int]) -> completion_pb2.Prompt:
    if isinstance(prompt, str):
        return completion_pb2.Prompt(text=prompt)
    return completion_pb2.Prompt(token_ids=completion_pb2.TokenIds(ids=prompt))


def answer(response: Response, body: TextCompletionRequest) -> TextCompletion:
    """The response to a request without `stream`."""
    header = response.header
    completion = TextCompletion(
        id=header.id,
        object="text_completion",
        created=header.create_time.seconds,
        model=header.model,
        system_fingerprint=header.system_fingerprint,
        choices=[_choice(choice, body) for choice in response.choices],
        usage=envelope.usage(response.usage),
    )
    if body.return_token_ids:
        prompts = [list(prompt.ids) for prompt in header.prompts]
        for shown, choice in zip(completion["choices"], response.choices, strict=True):
            shown["prompt_token_ids"] = prompts[choice.index // (body.n or 1)]
            shown["token_ids"] = list(choice.token_ids)
    if body.prompt_logprobs is not None:
        found: PromptLogprobs = []
        for shown, choice in zip(completion["choices"], response.choices, strict=True):
            if choice.prompt_logprobs:  # only the first choice of each prompt has them
                found = envelope.prompt_logprobs(choice.prompt_logprobs)
            shown["prompt_logprobs"] = found
    if body.service_tier is not None:
        completion["service_tier"] = "default"
    return completion


def _choice(choice: completion_pb2.CompletionChoice, body: TextCompletionRequest) -> TextChoice:
    return TextChoice(
        index=choice.index,
        text=choice.text,
        logprobs=_logprobs(choice.logprobs, choice.text) if body.logprobs is not None else None,
        finish_reason=FINISH_REASONS[choice.finish_reason],
    )


class CompletionChunks(Chunks[TextCompletionChunk]):
    """The chunks of a streamed plain completion."""

    object = "text_completion"

    def __init__(self, options: TextCompletionRequest) -> None:
        super().__init__(options)
        self._n = options.n or 1
        self._prompts: Sequence[chat_pb2.PromptTokens] = ()

    def _start(self, header: chat_pb2.CompletionHeader) -> None:
        super()._start(header)
        self._prompts = header.prompts

    def _choices(self, delta: completion_pb2.CompletionDelta) -> Iterator[TextChunkChoice]:
        index = delta.index
        self._completion_tokens[index] = delta.completion_tokens
        if delta.text or delta.logprobs:
            logprobs = _logprobs(delta.logprobs, delta.text) if delta.logprobs else None
            yield TextChunkChoice(
                index=index, text=delta.text, logprobs=logprobs, finish_reason=None
            )
        if delta.finish_reason:
            finish_reason = FINISH_REASONS[delta.finish_reason]
            yield TextChunkChoice(index=index, text="", logprobs=None, finish_reason=finish_reason)

    def _choices_with_ids(self, delta: completion_pb2.CompletionDelta) -> Iterator[TextChunkChoice]:
        index, token_ids = delta.index, list(delta.token_ids)
        prompt: list[int] | None = None
        if index not in self._completion_tokens:
            prompt = list(self._prompts[index // self._n].ids)
        empty = TextChunkChoice(index=index, text="", logprobs=None, finish_reason=None)
        for choice in list(self._choices(delta)) or ([empty] if token_ids or prompt else []):
            if prompt is not None:
                choice["prompt_token_ids"], prompt = prompt, None
            choice["token_ids"], token_ids = token_ids, []
            yield choice


def _logprobs(tokens: Sequence[completion_pb2.CompletionTokenLogprob], text: str) -> TextLogprobs:
    """`text` is the tokens' text; an echoed prompt's first token shows only its part of it."""
    shown = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in tokens:
        token = entry.token if entry.HasField("token") else None
        if token is None:
            end = tokens[1].text_offset if len(tokens) > 1 else len(text)
            shown["tokens"].append(text[:end])
        else:
            shown["tokens"].append(_name(token.token, token.bytes))
        shown["token_logprobs"].append(token.logprob if token else None)
        shown["top_logprobs"].append(_top(token) if token else None)
        shown["text_offset"].append(entry.text_offset)
    return shown


def _top(token: chat_pb2.TokenLogprob) -> dict[str, float]:
    """The most likely tokens, and always the sampled one."""
    top = {_name(other.token, other.bytes): other.logprob for other in token.top_logprobs}
    return top | {_name(token.token, token.bytes): token.logprob}


def _name(token: str, token_bytes: bytes) -> str:
    """The token as a key: incomplete characters differ in their bytes only."""
    if token.encode() == token_bytes:
        return token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
