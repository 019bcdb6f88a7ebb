"""Streams a completion: one generation for each prompt, decoded into events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from tokenizer_svc.constraint.grammar import attribute_error_to_field
from tokenizer_svc.generator.types import (
    CompletionReport,
    Constraint,
    GenerateCommand,
    GeneratorFinishReason,
    TokenIdLogprobs,
    TokenUpdate,
)
from tokenizer_svc.metrics import RequestMeter
from tokenizer_svc.models import ServedModel
from tokenizer_svc.output.completion import Completion
from tokenizer_svc.output.decoding_options import DecodingOptions
from tokenizer_svc.output.echo import Echo
from tokenizer_svc.output.events import Delta, Event, Header, PromptDelta, Usage
from tokenizer_svc.output.logprobs import describe_prompt
from tokenizer_svc.request.types import ValidOptions
from tokenizer_svc.trace import CompletionTrace
from trivium.field_errors import contradiction
from trivium.keys.keyed_request import current_request
from trivium.offload import INLINE_LOGPROBS, offload
from trivium.wire.errors import ServiceError, internal_error

log = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class CompletionJob:
    """A validated request with its prompts' token ids; a chat has one prompt.

    `created` is a Unix time in seconds. `echoes` has one entry per prompt, or none. `whole` means
    that nothing is sent to the caller before the end. `bad_words` are token ids.
    """

    id: str
    created: float
    prompts: Sequence[list[int]]
    options: ValidOptions
    decoding: DecodingOptions
    constraint: Constraint | None
    echoes: Sequence[Echo] = ()
    whole: bool = False
    bad_words: Sequence[Sequence[int]] = ()


async def stream_completion(
    served: ServedModel, job: CompletionJob, meter: RequestMeter, seconds: float | None
) -> AsyncGenerator[Event]:
    """Yields the header once the generator has admitted a prompt, then deltas, then the usage.

    Choices are numbered across all prompts. Takes at most `seconds`; raises ServiceError.
    """
    if job.options.prompt_logprobs is not None and not job.whole:
        raise contradiction("prompt_logprobs", "is not available in a stream.")
    model, n = served.model, job.options.n
    trace = CompletionTrace(job.id, model.id, job.options, is_stream=not job.whole)
    completions = [
        Completion(n, job.decoding, model.tokenizer, len(token_ids)) for token_ids in job.prompts
    ]
    streams = [
        _generate(served, job, completion, prompt_index, meter, trace, seconds)
        for prompt_index, completion in enumerate(completions)
    ]
    steps = streams[0] if len(streams) == 1 else merge_streams(streams)
    header: Header | None = Header(
        id=job.id,
        created=job.created,
        model=model.id,
        fingerprint=model.fingerprint,
        prompt_tokens=sum(map(len, job.prompts)),
        prompts=job.prompts if job.options.return_token_ids else (),
    )
    try:
        async with aclosing(steps):
            async for deltas in steps:
                if header is not None:
                    current_request().taken = partial(_taken, completions)
                    yield header
                    header = None
                for delta in deltas:
                    yield delta
    finally:
        trace.close()
    usage = _sum([completion.usage for completion in completions])
    trace.record_end(usage, [reason for each in completions for reason in each.finish_reasons])
    yield usage


def _command(served: ServedModel, job: CompletionJob, token_ids: list[int]) -> GenerateCommand:
    """The command for the generator; `max_new_tokens` fits into the context left by the prompt.

    Raises ServiceError if that leaves less than `min_tokens`.
    """
    options = job.options
    remaining_context = served.context_length - len(token_ids)
    if options.min_tokens > remaining_context:
        message = (
            f"'min_tokens' is {options.min_tokens}, and this prompt leaves {remaining_context} of "
            f"the context's {served.context_length} tokens."
        )
        raise ServiceError("invalid_value", message, "min_tokens")
    max_tokens = options.max_completion_tokens
    if max_tokens == 0:
        max_tokens = 1  # is dropped, see _without_tokens; computing the prompt is what counts
    if max_tokens is None and served.default_max_tokens is not None:
        max_tokens = max(served.default_max_tokens, options.min_tokens)
    return GenerateCommand(
        revision=served.model.revision,
        token_ids=token_ids,
        options=options,
        max_new_tokens=(
            remaining_context if max_tokens is None else min(max_tokens, remaining_context)
        ),
        constraint=job.constraint,
        whole=job.whole,
        bad_words=job.bad_words,
    )


async def _generate(
    served: ServedModel,
    job: CompletionJob,
    completion: Completion,
    prompt_index: int,
    meter: RequestMeter,
    trace: CompletionTrace,
    seconds: float | None,
) -> AsyncGenerator[list[Delta]]:
    """Yields the deltas of each generator message, for the prompt at `prompt_index`.

    Deltas and metrics use choice indices that are numbered across all prompts.
    """
    token_ids, first_index = job.prompts[prompt_index], prompt_index * job.options.n
    echo = job.echoes[prompt_index] if job.echoes else None
    served.watch.check_available()
    generation = served.connection.generate(_command(served, job, token_ids), seconds)
    admitted = False
    try:
        async with aclosing(generation.messages()) as messages:
            async for updates in messages:
                if job.options.max_completion_tokens == 0:
                    updates = [_without_tokens(update) for update in updates]
                first: list[Delta] = []
                if not admitted:
                    meter.prompt(served.model.id, len(token_ids))
                    admitted = True
                    begin = partial(_begin, served, job, prompt_index, updates[0].prompt_logprobs)
                    first = await offload(len(updates[0].prompt_logprobs), begin, INLINE_LOGPROBS)
                step = trace.decode(completion, updates)
                await generation.stop(step.stops)
                deltas = step.deltas if echo is None else list(map(echo.shift, step.deltas))
                if first:
                    deltas = [*first, *deltas]
                if first_index:
                    deltas = [replace(delta, index=first_index + delta.index) for delta in deltas]
                meter.step(updates, deltas, first_index)
                yield deltas
                if completion.done:
                    await generation.report(_report(completion))
    except ServiceError as error:
        raise _public_error(error, job) from error
    if not completion.done:
        log.error("the generator ended the call before all choices had finished")
        raise internal_error()


def _public_error(error: ServiceError, job: CompletionJob) -> ServiceError:
    """The generator's error, with the public name of the field that it is about."""
    param = error.param or ""
    if param == "prompt_logprobs" and job.options.prompt_logprobs is None:
        # Requested by `echo` and `logprobs`.
        return ServiceError(error.code, error.message, "logprobs")
    if param.startswith("sampling."):
        return ServiceError(error.code, error.message, param.removeprefix("sampling."))
    return attribute_error_to_field(error, job.constraint)


def _without_tokens(update: TokenUpdate) -> TokenUpdate:
    """An update for a request that only wants its prompt echoed or scored."""
    finished = update.finished and replace(
        update.finished, reason=GeneratorFinishReason.LENGTH, completion_tokens=0
    )
    return replace(update, token_ids=(), logprobs=(), finished=finished)


def _begin(
    served: ServedModel, job: CompletionJob, prompt_index: int, scores: Sequence[TokenIdLogprobs]
) -> list[Delta]:
    """The deltas that echo the prompt and report on its tokens, before those of the answer.

    `scores` are all tokens' but the first, if any are requested.
    """
    options = job.options
    deltas: list[Delta] = []
    if options.prompt_logprobs is not None:
        found = describe_prompt(
            served.model.tokenizer, job.prompts[prompt_index], scores, options.prompt_logprobs
        )
        deltas.append(PromptDelta(0, "", (), completion_tokens=0, prompt_logprobs=found))
    if job.echoes:
        deltas += job.echoes[prompt_index].begin(options.n, scores, options.echo_logprobs)
    return deltas


def _report(completion: Completion) -> CompletionReport:
    usage = completion.usage
    reasons = dict.fromkeys(reason.value for reason in completion.finish_reasons)
    return CompletionReport(usage.completion_tokens, usage.reasoning_tokens, list(reasons))


async def merge_streams(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """Yields the items of all streams as they arrive.

    Ends when all streams have ended; the first error ends all of them.
    """
    # At most one item is buffered, so that a slow reader slows the streams down (backpressure).
    items: asyncio.Queue[Item] = asyncio.Queue(1)
    readers = [asyncio.create_task(_read(stream, items)) for stream in streams]
    getting: asyncio.Task[Item] | None = None
    try:
        while not items.empty() or not all(reader.done() for reader in readers):
            getting = getting or asyncio.create_task(items.get())
            waiting = [reader for reader in readers if not reader.done()]
            await asyncio.wait([getting, *waiting], return_when=asyncio.FIRST_COMPLETED)
            for reader in readers:
                if reader.done():
                    reader.result()
            if getting.done():
                yield getting.result()
                getting = None
    finally:
        tasks = readers if getting is None else [*readers, getting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(stream: AsyncGenerator[Item], items: asyncio.Queue[Item]) -> None:
    async with aclosing(stream):
        async for item in stream:
            await items.put(item)


def _taken(completions: Sequence[Completion]) -> tuple[int, int | None]:
    """Tokens so far, and the device time in nanoseconds once all choices have finished."""
    usage = _sum([completion.usage for completion in completions])
    is_done = all(completion.done for completion in completions)
    tokens = usage.prompt_tokens + usage.completion_tokens
    return tokens, usage.device_nanoseconds if is_done else None


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
        device_nanoseconds=sum(usage.device_nanoseconds for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )
