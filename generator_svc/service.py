"""gRPC to the engine and back: one call is one group, its mailbox, and its commands.

The road of a call: `Generate` → `to_generation` → `engine.submit` → the engine's thread →
`Mailroom.deliver` → mailbox → `to_response`. Decides nothing about scheduling or sampling.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from generator_svc.admission import QueueFull
from generator_svc.constraint.compiler import (
    CompilerBusy,
    ConstraintCompiler,
    ConstraintsUnavailable,
)
from generator_svc.convert import CONSTRAINT, Limits, to_constraint, to_generation, to_response
from generator_svc.engine import Engine
from generator_svc.metrics import RequestMetrics
from generator_svc.sequence import (
    Constraint,
    ConstraintError,
    FinishReason,
    Generation,
    Group,
    Update,
)
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc as pb_grpc
from trivium.wire.errors import ServiceError, internal_error

log = logging.getLogger(__name__)

Call = grpc.aio.ServicerContext[Any, Any]

_RETRY_TOKENS_PER_SECOND = 1_000  # a cautious guess of how fast a queue of prompts drains


class Mailbox:
    """What became ready for a call since it was last emptied. For the event loop's thread."""

    def __init__(self) -> None:
        self._updates: list[Update] = []
        self._ready = asyncio.Event()

    def put(self, update: Update) -> None:
        self._updates.append(update)
        self._ready.set()

    async def take(self) -> list[Update]:
        """Waits for at least one update and returns all there are."""
        await self._ready.wait()
        self._ready.clear()
        updates, self._updates = self._updates, []
        return updates


class Mailroom:
    """Carries updates from the engine's thread into mailboxes, all of a step at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def deliver(self, updates: list[Update]) -> None:
        self._loop.call_soon_threadsafe(self._sort, updates)

    @staticmethod
    def _sort(updates: list[Update]) -> None:
        for update in updates:
            update.group.tag.put(update)


class _Clock:
    """Times of a call's tokens, for its metrics."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._arrival = time.monotonic()
        self._last: dict[int, float] = {}

    def observe(self, updates: list[Update]) -> None:
        now = time.monotonic()
        for update in updates:
            if update.token is None:
                continue
            index = update.sequence.index
            if not self._last:
                self._metrics.first_token.observe(now - self._arrival)
                self._metrics.prompt_tokens.inc(update.sequence.prompt_length)
                self._metrics.cached_tokens.inc(update.sequence.cached_prompt_tokens)
            elif index in self._last:
                self._metrics.next_token.observe(now - self._last[index])
            self._last[index] = now
            self._metrics.generation_tokens.inc()


def _told(error: BaseException) -> ServiceError:
    """What a caller is told of a step that failed."""
    if isinstance(error, ConstraintError):
        return ServiceError(error.code, error.message, CONSTRAINT)
    log.error("a step failed", exc_info=error)
    return internal_error()


class GeneratorService(pb_grpc.GeneratorServiceServicer):
    """trivium.generator.v1.GeneratorService over one engine."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        info: pb.GetModelInfoResponse,
        metrics: RequestMetrics,
        constraints: ConstraintCompiler,
    ) -> None:
        self._engine = engine
        self._constraints = constraints
        self._limits = limits
        self._info = info
        self._metrics = metrics

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Call
    ) -> AsyncIterator[pb.GenerateResponse]:
        clock = _Clock(self._metrics)
        generation = await self._first(request_iterator)
        mailbox = Mailbox()
        group = self._submit(generation, mailbox)
        commands = asyncio.create_task(self._follow(request_iterator, group))
        outcome = FinishReason.CANCELLED
        try:
            running = generation.n
            while running:
                updates = await mailbox.take()
                clock.observe(updates)
                for update in updates:
                    if update.error is not None:
                        outcome = FinishReason.FAILED
                        raise _told(update.error)
                running -= sum(update.is_finished for update in updates)
                yield to_response(updates)
            outcome = group.sequences[0].finish_reason or outcome
        finally:
            self._engine.cancel(group)
            commands.cancel()
            self._metrics.finished(outcome.name.lower())

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Call
    ) -> pb.GetModelInfoResponse:
        return self._info

    async def GetLoad(self, request: pb.GetLoadRequest, context: Call) -> pb.GetLoadResponse:
        load = self._engine.load()
        return pb.GetLoadResponse(
            waiting_sequences=load.waiting_sequences,
            running_sequences=load.running_sequences,
            free_slots=load.slots - load.used_slots,
            waiting_prompt_tokens=load.waiting_tokens,
        )

    async def _first(self, requests: AsyncIterator[pb.GenerateRequest]) -> Generation:
        async for request in requests:
            if request.HasField("start"):
                generation = to_generation(request.start, self._limits)
                constraint = to_constraint(request.start)
                if constraint is None:
                    return generation
                return replace(generation, constraint=await self._compile(*constraint))
            break
        raise ServiceError(
            "missing_required_parameter", "The first message has to start a generation.", "start"
        )

    async def _compile(self, kind: str, text: str) -> Constraint:
        try:
            return await self._constraints.compile(kind, text)
        except ConstraintError as error:
            raise ServiceError(error.code, error.message, CONSTRAINT) from None
        except ConstraintsUnavailable as error:
            log.warning("a constraint was refused: %s", error)
            message = "This model's tokenizer does not allow constraints."
            raise ServiceError("unsupported_parameter", message, CONSTRAINT) from None
        except CompilerBusy:
            message = "The server compiles as many constraints as it can. Please try again later."
            raise ServiceError("queue_full", message) from None

    def _submit(self, generation: Generation, mailbox: Mailbox) -> Group:
        try:
            return self._engine.submit(generation, mailbox)
        except QueueFull as full:
            retry = min(max(1, full.waiting_tokens // _RETRY_TOKENS_PER_SECOND), 60)
            raise ServiceError(
                "queue_full",
                "The server has as many requests waiting as it takes. Please try again later.",
                retry_after=retry,
            ) from None

    async def _follow(self, requests: AsyncIterator[pb.GenerateRequest], group: Group) -> None:
        """Carries out the caller's stop commands; others, and indices that do not exist, are
        without effect, since what they might mean has ended or never began."""
        async for request in requests:
            if request.HasField("stop") and 0 <= request.stop.index < group.generation.n:
                self._engine.stop(group, request.stop.index)
