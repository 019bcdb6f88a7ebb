"""GeneratorService over the engine: a call is one sequence group, its updates and its commands.

The path of a call: `Generate` → `to_engine_request` → `engine.submit` → the engine's thread →
`UpdateDispatcher.deliver` → the call's UpdateQueue → `to_response`.
"""

import asyncio
import logging
import math
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
from generator_svc.convert import (
    CONSTRAINT,
    Limits,
    to_constraint,
    to_engine_request,
    to_load_interval,
    to_report,
    to_response,
)
from generator_svc.delivery import UpdateQueue
from generator_svc.engine import Engine, Load
from generator_svc.metrics import RequestMetrics
from generator_svc.sequence import (
    Constraint,
    ConstraintError,
    EngineRequest,
    FinishReason,
    SequenceGroup,
)
from generator_svc.usage import CallUsage, UsageRecorder
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc as pb_grpc
from trivium.wire import tracing
from trivium.wire.errors import ERRORS, ServiceError, code_of, internal_error
from trivium.wire.in_flight import wait_for_any

log = logging.getLogger(__name__)

Call = grpc.aio.ServicerContext[Any, Any]

_LOAD_REPORT_SECONDS = 5.0  # maximum between load reports, even if the load is unchanged
_MAX_RETRY_SECONDS = 60
_REPORT_SECONDS = 5.0  # how long to wait for an announced completion report


def _to_service_error(error: BaseException) -> ServiceError:
    """The error that the caller gets for a failed step."""
    if isinstance(error, ConstraintError):
        return ServiceError(error.code, error.message, error.param)
    log.error("an engine step failed", exc_info=error)
    return internal_error()


async def _receive_start(messages: AsyncIterator[pb.GenerateRequest]) -> pb.StartGeneration:
    """The start message, which has to be the first; raises ServiceError."""
    async for message in messages:
        if message.HasField("start"):
            return message.start
        break
    raise ServiceError("missing_required_parameter", "The first message must be `start`.", "start")


def _to_load_response(load: Load) -> pb.WatchLoadResponse:
    return pb.WatchLoadResponse(
        waiting_sequences=load.waiting_sequences,
        running_sequences=load.running_sequences,
        free_slots=load.slots - load.used_slots,
        waiting_prompt_tokens=load.waiting_tokens,
    )


class GeneratorService(pb_grpc.GeneratorServiceServicer):
    """trivium.generator.v1.GeneratorService over one engine; `draining` ends load reports."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        info: pb.GetModelInfoResponse,
        metrics: RequestMetrics,
        constraints: ConstraintCompiler,
        draining: asyncio.Event,
        usage: UsageRecorder,
    ) -> None:
        self._engine = engine
        self._usage = usage
        self._constraints = constraints
        self._limits = limits
        self._info = info
        self._metrics = metrics
        self._draining = draining
        self._submitted = 0  # calls in the engine
        self._busy = asyncio.Event()  # set while there are any

    def refused(self, method: str, code: str) -> None:
        """Counts a call of `method` that was refused before it reached the service."""
        if method.endswith("/Generate"):
            self._metrics.rejected(code)

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Call
    ) -> AsyncIterator[pb.GenerateResponse]:
        queue = UpdateQueue(self._metrics)
        tracing.current().rename(f"generate {self._info.id}")
        try:
            start = await _receive_start(request_iterator)
            queue.is_whole = start.whole
            request = await self._checked(start)
            group = self._submit(request, queue)
        except ServiceError as error:
            self._metrics.rejected(error.code)
            raise
        usage = self._usage.begin(group, queue)
        self._submitted += 1
        self._busy.set()
        commands = asyncio.create_task(self._handle_commands(request_iterator, group, usage))
        outcome = FinishReason.CANCELLED
        try:
            running = request.n
            while running:
                updates = await queue.take()
                for update in updates:
                    if update.error is not None:
                        outcome = FinishReason.FAILED
                        failure = _to_service_error(update.error)
                        usage.status = failure.kind.http
                        raise failure
                running -= sum(update.is_finished for update in updates)
                self._metrics.sent(updates)
                yield to_response(updates)
            outcome = group.sequences[0].finish_reason or outcome
            queue.observe_phases(group)
            usage.status = 200
            if start.sends_report:
                await asyncio.wait([commands], timeout=_REPORT_SECONDS)
        except (asyncio.CancelledError, GeneratorExit) as error:
            if usage.status != 200:
                code = "draining" if self._draining.is_set() else code_of(error)
                usage.status = ERRORS[code].http
            raise
        finally:
            usage.end()
            self._engine.cancel(group, usage.settled)
            self._submitted -= 1
            if not self._submitted:
                self._busy.clear()
            commands.cancel()
            queue.trace_phases(group)
            self._metrics.finished(outcome.name.lower())

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Call
    ) -> pb.GetModelInfoResponse:
        return self._info

    async def WatchLoad(
        self, request: pb.WatchLoadRequest, context: Call
    ) -> AsyncIterator[pb.WatchLoadResponse]:
        """Polls the load on the event loop, so that reports cost the engine's steps nothing.

        While calls are in flight, it is polled at the caller's interval; otherwise it does not
        change and is not polled.
        """
        interval = to_load_interval(request)
        reported, due = None, 0.0
        while not self._draining.is_set():
            load = self._engine.load()
            now = time.monotonic()
            if load != reported or now >= due:
                yield _to_load_response(load)
                reported, due = load, now + _LOAD_REPORT_SECONDS
            if load.is_idle:
                await wait_for_any(due - now - interval, self._draining, self._busy)
            # Gives a call that has just arrived time to get a slot: until then its whole prompt
            # counts as waiting, cached or not, and callers would avoid this replica, which has the
            # prefix, until the next report.
            await wait_for_any(interval, self._draining)

    async def _checked(self, start: pb.StartGeneration) -> EngineRequest:
        """The request, with its constraint compiled; raises ServiceError."""
        request = to_engine_request(start, self._limits)
        constraint = to_constraint(start)
        if constraint is None:
            return request
        return replace(request, constraint=await self._compile(*constraint))

    async def _compile(self, kind: str, text: str) -> Constraint:
        try:
            with tracing.span("compile"):
                return await self._constraints.compile(kind, text)
        except ConstraintError as error:
            raise ServiceError(error.code, error.message, CONSTRAINT) from None
        except ConstraintsUnavailable as error:
            log.warning("constraint rejected: %s", error)
            message = "This model's tokenizer does not support constraints."
            raise ServiceError("unsupported_parameter", message, CONSTRAINT) from None
        except CompilerBusy:
            message = "The server is compiling too many constraints. Please try again later."
            raise ServiceError("queue_full", message) from None

    def _submit(self, request: EngineRequest, queue: UpdateQueue) -> SequenceGroup:
        try:
            return self._engine.submit(request, queue)
        except QueueFull as full:
            seconds = math.ceil(self._engine.prefill_seconds(full.waiting_tokens))
            raise ServiceError(
                "queue_full",
                "The server's queue is full. Please try again later.",
                retry_after=min(max(seconds, 1), _MAX_RETRY_SECONDS),
            ) from None

    async def _handle_commands(
        self, messages: AsyncIterator[pb.GenerateRequest], group: SequenceGroup, usage: CallUsage
    ) -> None:
        """Executes the caller's stop commands; returns after its completion report.

        Other messages and unknown indices are ignored: there is nothing that they could refer to.
        """
        async for message in messages:
            if message.HasField("stop") and 0 <= message.stop.index < group.request.n:
                self._engine.stop(group, message.stop.index)
            elif message.HasField("report"):
                usage.report = to_report(message.report)
                return
