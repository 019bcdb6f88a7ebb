"""From a checked request to the generator and back: one generation, read as it comes.

Knows no protobuf and no callers.
"""

import logging
import secrets
import string
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from tokenizer_svc.constraint.grammar import blamed, constraint
from tokenizer_svc.families.parser import Parser
from tokenizer_svc.generator.types import Constraint, Start
from tokenizer_svc.metrics import RequestMeter
from tokenizer_svc.models import Model
from tokenizer_svc.output.choice import Reading
from tokenizer_svc.output.completion import Completion
from tokenizer_svc.output.events import Delta, FinishReason
from tokenizer_svc.output.stop import StopStrings
from tokenizer_svc.prompt.builder import Prompt
from tokenizer_svc.request.types import ValidOptions, ValidRequest
from tokenizer_svc.served_model import ServedModel
from trivium.wire.errors import ServiceError, internal_error

log = logging.getLogger(__name__)

_LETTERS_AND_DIGITS = string.ascii_letters + string.digits


def chat_constraint(model: Model, request: ValidRequest, prompt: Prompt) -> Constraint | None:
    """What the answer to a chat request has to fit."""
    return constraint(
        request.options.form,
        request.tool_use,
        model.output,
        prompt.thinking,
        model.tokenizer.marker_id,
    )


def chat_reading(model: Model, request: ValidRequest, prompt: Prompt) -> Reading:
    """How the answer to a chat request is read."""
    output, use = model.output, request.tool_use
    names, markers = use.names, output.markers(calls=bool(use.names))
    marker_id = model.tokenizer.marker_id

    def parser() -> Parser:
        return output.parser(names, prompt.thinking)

    return replace(
        plain_reading(request.options),
        parser=parser,
        call_id=_short_call_id if output.short_call_ids else _call_id,
        markers=markers,
        spelled_markers=frozenset(text for text in markers if marker_id(text) is None),
        forced_call=use.forced,
        # As OpenAI has it: a call that the caller named is no decision of the model's.
        call_finish_reason=FinishReason.STOP if use.named else FinishReason.TOOL_CALLS,
    )


def plain_reading(options: ValidOptions) -> Reading:
    """How an answer that is text and nothing else is read."""
    return Reading(
        show_hidden=not options.skip_special_tokens,
        stops=StopStrings(options.stop),
        include_stop=options.include_stop,
        min_tokens=options.min_tokens,
    )


def start(
    served: ServedModel,
    options: ValidOptions,
    token_ids: list[int],
    constraint: Constraint | None,
) -> Start:
    """What the generator is asked for, within the room that the prompt leaves."""
    room = served.context_length - len(token_ids)
    longest = options.max_completion_tokens
    if longest is None and served.default_max_tokens is not None:
        longest = max(served.default_max_tokens, options.min_tokens)
    return Start(
        revision=served.model.revision,
        token_ids=token_ids,
        options=options,
        max_new_tokens=room if longest is None else min(longest, room),
        constraint=constraint,
    )


async def answer(
    served: ServedModel,
    start: Start,
    completion: Completion,
    meter: RequestMeter,
    seconds: float | None,
    first_index: int = 0,
) -> AsyncGenerator[list[Delta]]:
    """What follows from each message of the generator, in at most `seconds`.

    Choices count from `first_index` in what is metered and shown.
    """
    served.watch.check_available()
    generation = served.connection.generate(start, seconds)
    admitted = False
    try:
        async with aclosing(generation.messages()) as messages:
            async for updates in messages:
                if not admitted:
                    meter.prompt(served.model.id, len(start.token_ids))
                    admitted = True
                step = completion.take(updates)
                await generation.stop(step.stops)
                deltas = step.deltas
                if first_index:
                    deltas = [replace(delta, index=first_index + delta.index) for delta in deltas]
                meter.step(updates, deltas, first_index)
                yield deltas
    except ServiceError as error:
        raise blamed(error, start.constraint) from error
    if not completion.done:
        log.error("the generator ended the call before its choices")
        raise internal_error()


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_call_id() -> str:
    """Mistral's template takes none but these."""
    return "".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(9))
