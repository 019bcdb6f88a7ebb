"""The gRPC calls that complete plain prompts: one generation for each, read as they come.

Decides nothing about text.
"""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from tokenizer_svc.completion_stream import answer, plain_reading, start
from tokenizer_svc.constraint.grammar import bare
from tokenizer_svc.convert.request import completion_request
from tokenizer_svc.convert.response import completion_event, whole_completion
from tokenizer_svc.merge import merged
from tokenizer_svc.metrics import Metrics, RequestMeter
from tokenizer_svc.models import INLINE_BYTES, Model, off_loop
from tokenizer_svc.output.completion import Completion, WholeAnswer
from tokenizer_svc.output.events import Delta, Event, Header, Usage
from tokenizer_svc.request.request_size import check_completion_size
from tokenizer_svc.request.types import CompletionRequest, ValidOptions
from tokenizer_svc.request.validate import validate_completion
from tokenizer_svc.served_model import ServedModel, ServedModels
from trivium.chat.v1 import completion_pb2, completion_pb2_grpc
from trivium.wire.channel import remaining_seconds
from trivium.wire.errors import ServiceError

Call = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _Prompt:
    text: str  # as an echo shows it
    token_ids: list[int]


class CompletionService(completion_pb2_grpc.CompletionServiceServicer):
    """trivium.chat.v1.CompletionService; the unary call is the stream, read to its end."""

    def __init__(self, models: ServedModels, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    async def StreamCompletion(
        self, request: completion_pb2.CreateCompletionRequest, context: Call
    ) -> AsyncIterator[completion_pb2.StreamCompletionResponse]:
        async with aclosing(self._complete(request, context)) as events:
            async for event in events:
                yield completion_event(event)

    async def CreateCompletion(
        self, request: completion_pb2.CreateCompletionRequest, context: Call
    ) -> completion_pb2.CreateCompletionResponse:
        whole = WholeAnswer()
        async with aclosing(self._complete(request, context)) as events:
            async for event in events:
                whole.push(event)
        return whole_completion(whole)

    async def _complete(
        self, asked: completion_pb2.CreateCompletionRequest, context: Call
    ) -> AsyncGenerator[Event]:
        accepted = time.time()
        with self._metrics.request() as meter:
            check_completion_size(asked)
            served = self._models.find(asked.model)
            model = served.model
            request, options = await off_loop(
                asked.ByteSize(), lambda: _valid(asked, model), INLINE_BYTES
            )
            prompts = [await _prompt(served, request, place) for place in _places(request)]
            tokens = sum(len(prompt.token_ids) for prompt in prompts)
            completions = [_completion(served, options, prompt) for prompt in prompts]
            steps = merged(_answers(served, options, prompts, completions, meter, context))
            header: Header | None = _header(served, accepted, tokens)
            async with aclosing(steps):
                async for deltas in steps:
                    if header is not None:
                        yield header
                        header = None
                        for delta in _echo(request, options, prompts):
                            yield delta
                    for delta in deltas:
                        yield delta
            yield _sum([completion.usage for completion in completions])


def _valid(
    asked: completion_pb2.CreateCompletionRequest, model: Model
) -> tuple[CompletionRequest, ValidOptions]:
    request = completion_request(asked)
    return request, validate_completion(request, model.vocabulary_size)


def _places(request: CompletionRequest) -> range:
    return range(len(request.prompts))


async def _prompt(served: ServedModel, request: CompletionRequest, place: int) -> _Prompt:
    """The prompt at this place, within the context."""
    model, prompt = served.model, request.prompts[place]
    assert prompt is not None, "An unchecked prompt is to be answered. This is a bug."
    param = f"prompt[{place}]" if len(request.prompts) > 1 else "prompt"
    if isinstance(prompt, str):
        token_ids = await model.encode(prompt, served.context_length, param)
        if not token_ids:
            message = f"Invalid '{param}': empty string. Expected at least one token."
            raise ServiceError("invalid_value", message, param)
        return _Prompt(prompt, token_ids)
    token_ids = list(prompt)
    model.check_tokens(len(token_ids), served.context_length, param)
    return _Prompt(model.tokenizer.decode(token_ids) if request.echo else "", token_ids)


def _completion(served: ServedModel, options: ValidOptions, prompt: _Prompt) -> Completion:
    reading, tokens = plain_reading(options), len(prompt.token_ids)
    return Completion(options.n, reading, served.model.tokenizer, tokens)


def _answers(
    served: ServedModel,
    options: ValidOptions,
    prompts: Sequence[_Prompt],
    completions: Sequence[Completion],
    meter: RequestMeter,
    context: Call,
) -> list[AsyncGenerator[list[Delta]]]:
    """A generation for each prompt, whose choices count on from those of the prompts before."""
    constraint = None if options.form is None else bare(options.form)
    seconds = remaining_seconds(context)
    return [
        answer(
            served,
            start(served, options, prompt.token_ids, constraint),
            completion,
            meter,
            seconds,
            first_index=place * options.n,
        )
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def _echo(
    request: CompletionRequest, options: ValidOptions, prompts: Sequence[_Prompt]
) -> list[Delta]:
    """The prompts' text in front of their choices', if that is wanted."""
    if not request.echo:
        return []
    texts = [prompt.text for prompt in prompts for _ in range(options.n)]
    return [Delta(index, text, (), completion_tokens=0) for index, text in enumerate(texts)]


def _header(served: ServedModel, accepted: float, prompt_tokens: int) -> Header:
    return Header(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=accepted,
        model=served.model.id,
        fingerprint=served.model.fingerprint,
        prompt_tokens=prompt_tokens,
    )


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
        device_nanoseconds=sum(usage.device_nanoseconds for usage in usages),
    )
