"""CompletionService: plain prompts, several in one request."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from tokenizer_svc.completion_stream import CompletionJob, stream_completion
from tokenizer_svc.constraint.grammar import whole_output
from tokenizer_svc.convert.request import completion_request
from tokenizer_svc.convert.response import completion_event, whole_completion
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import Model, ServedModel, ServedModels
from tokenizer_svc.output.completion import WholeCompletion
from tokenizer_svc.output.decoding_options import plain_decoding
from tokenizer_svc.output.echo import Echo
from tokenizer_svc.output.events import Delta, Event
from tokenizer_svc.request.request_size import check_completion_size
from tokenizer_svc.request.types import CompletionRequest, ValidOptions
from tokenizer_svc.request.validate import check_prompt_logprobs, validate_completion
from tokenizer_svc.trace import name_request
from trivium.chat.v1 import completion_pb2, completion_pb2_grpc
from trivium.field_errors import empty_string
from trivium.offload import INLINE_BYTES, INLINE_LOGPROBS, offload
from trivium.wire.channel import remaining_seconds

Call = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _PlainPrompt:
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
        async with aclosing(self._complete(request, context, whole=False)) as events:
            async for event in events:
                logprobs = len(event.logprobs) if isinstance(event, Delta) else 0
                yield await offload(logprobs, partial(completion_event, event), INLINE_LOGPROBS)

    async def CreateCompletion(
        self, request: completion_pb2.CreateCompletionRequest, context: Call
    ) -> completion_pb2.CreateCompletionResponse:
        whole = WholeCompletion()
        async with aclosing(self._complete(request, context, whole=True)) as events:
            async for event in events:
                whole.push(event)
        return await offload(whole.logprobs, lambda: whole_completion(whole), INLINE_LOGPROBS)

    async def _complete(
        self, message: completion_pb2.CreateCompletionRequest, context: Call, whole: bool
    ) -> AsyncGenerator[Event]:
        created = time.time()
        name_request("text_completion", message.model)
        with self._metrics.request() as meter:
            check_completion_size(message)
            served = self._models.find(message.model)
            model = served.model
            request, options = await offload(
                message.ByteSize(), lambda: _valid(message, model), INLINE_BYTES
            )
            kept = served.kept_tokens(options)
            prompts = [
                await _prompt(served, request, index, kept) for index in range(len(request.prompts))
            ]
            tokens = sum(len(prompt.token_ids) for prompt in prompts)
            check_prompt_logprobs(options, tokens, options.n)
            response = options.response_constraint
            constraint = None if response is None else whole_output(response)
            job = CompletionJob(
                id=f"cmpl-{uuid.uuid4().hex}",
                created=created,
                prompts=[prompt.token_ids for prompt in prompts],
                options=options,
                decoding=plain_decoding(options),
                constraint=constraint,
                echoes=[
                    Echo(model.tokenizer, prompt.text, prompt.token_ids)
                    for prompt in prompts
                    if request.echo
                ],
                whole=whole,
                bad_words=await model.encode_bad_words(options.bad_words),
            )
            events = stream_completion(served, job, meter, remaining_seconds(context))
            async with aclosing(events):
                async for event in events:
                    yield event


def _valid(
    message: completion_pb2.CreateCompletionRequest, model: Model
) -> tuple[CompletionRequest, ValidOptions]:
    request = completion_request(message)
    return request, validate_completion(request, model.vocabulary_size)


async def _prompt(
    served: ServedModel, request: CompletionRequest, index: int, kept: int | None
) -> _PlainPrompt:
    """The prompt at `index`, or its last `kept` tokens; raises ServiceError if it does not fit the
    context."""
    model, prompt = served.model, request.prompts[index]
    assert prompt is not None, "An unchecked prompt is to be answered. This is a bug."
    param = f"prompt[{index}]" if len(request.prompts) > 1 else "prompt"
    text: str | None = None
    if isinstance(prompt, str):
        max_tokens = served.context_length if kept is None else None
        token_ids = await model.encode(prompt, max_tokens, param, request.add_special_tokens)
        if not token_ids:
            raise empty_string(param, "token")
        text = prompt
    else:
        token_ids = list(prompt)
    if kept is not None and len(token_ids) > kept:
        token_ids, text = token_ids[-kept:], None
    model.check_tokens(len(token_ids), served.context_length, param)
    if not request.echo:
        return _PlainPrompt("", token_ids)
    if text is None:
        text = await offload(len(token_ids), lambda: model.tokenizer.decode(token_ids))
    return _PlainPrompt(text, token_ids)
