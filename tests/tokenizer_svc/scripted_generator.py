"""A generator that follows a script, over real gRPC on loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from tests.ports import free_port
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc
from trivium.wire.channel import revision_service
from trivium.wire.errors import from_rpc_error
from trivium.wire.serving import GrpcServer

SERVICE = "trivium.generator.v1.GeneratorService"

Stops = asyncio.Queue[int]
Script = Callable[[pb.StartGeneration, Stops], AsyncIterator[pb.GenerateResponse]]


@dataclass
class Seen:
    """One call as the generator saw it."""

    start: pb.StartGeneration
    metadata: dict[str, str | bytes]
    seconds_left: float | None
    stops: list[int] = field(default_factory=list)
    report: pb.CompletionReport | None = None
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedGenerator(generator_pb2_grpc.GeneratorServiceServicer):
    """Every call of Generate runs `script`; `calls` records the calls."""

    def __init__(self, revision: str, context_length: int = 512) -> None:
        self.revision = revision
        self.context_length = context_length
        self.script: Script = says([])
        self.calls: list[Seen] = []
        self.called = asyncio.Event()
        self.instance_id = "first"
        self.watched = asyncio.Event()

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        first = await anext(request_iterator)
        seen = Seen(first.start, dict(context.invocation_metadata()), context.time_remaining())
        self.calls.append(seen)
        self.called.set()
        stops: Stops = asyncio.Queue()
        listening = asyncio.create_task(self._listen(request_iterator, seen, stops))
        try:
            async for response in self.script(first.start, stops):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            seen.cancelled.set()
            raise
        finally:
            listening.cancel()

    @staticmethod
    async def _listen(
        requests: AsyncIterator[pb.GenerateRequest], seen: Seen, stops: Stops
    ) -> None:
        async for request in requests:
            if request.HasField("report"):
                seen.report = request.report
                seen.reported.set()
                continue
            seen.stops.append(request.stop.index)
            stops.put_nowait(request.stop.index)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Any
    ) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(
            revision=self.revision,
            context_length=self.context_length,
            instance_id=self.instance_id,
        )

    async def WatchLoad(
        self, request: pb.WatchLoadRequest, context: Any
    ) -> AsyncIterator[pb.WatchLoadResponse]:
        self.watched.set()
        yield pb.WatchLoadResponse(free_slots=100)  # with no free slots, calls would go elsewhere

    async def serve(
        self, port: int | None = None, host: str = "127.0.0.1"
    ) -> tuple[GrpcServer, int]:
        """Starts a server that is SERVING; returns it and its port."""
        add = generator_pb2_grpc.add_GeneratorServiceServicer_to_server
        server = GrpcServer([(add, self)], [SERVICE], [revision_service(SERVICE, self.revision)])
        port = await server.start(f"{host}:{port or free_port()}")
        server.set_serving(True)
        return server, port


def says(messages: Sequence[pb.GenerateResponse]) -> Script:
    """These messages, then the end."""

    async def script(start: pb.StartGeneration, stops: Stops) -> AsyncIterator[pb.GenerateResponse]:
        for message in messages:
            yield message

    return script


def says_until_stopped(
    messages: Sequence[pb.GenerateResponse],
    choices: int = 1,
    nanoseconds: int = 1_000,
    cached: int = 0,
) -> Script:
    """These messages; then `choices` choices end when stopped, each with one token too many."""

    async def script(start: pb.StartGeneration, stops: Stops) -> AsyncIterator[pb.GenerateResponse]:
        for message in messages:
            yield message
        for _ in range(choices):
            index = await stops.get()
            last = finish(index, pb.FINISH_REASON_STOPPED, 99, nanoseconds, cached)
            yield message_of(update(index, [65]), last)

    return script


def stalls_after(messages: Sequence[pb.GenerateResponse]) -> Script:
    """These messages, then the stream hangs forever."""

    async def script(start: pb.StartGeneration, stops: Stops) -> AsyncIterator[pb.GenerateResponse]:
        for message in messages:
            yield message
        await asyncio.Event().wait()

    return script


def fails_after(messages: Sequence[pb.GenerateResponse], error: Exception) -> Script:
    """These messages, then an error."""

    async def script(start: pb.StartGeneration, stops: Stops) -> AsyncIterator[pb.GenerateResponse]:
        for message in messages:
            yield message
        raise error

    return script


def message_of(*updates: pb.SequenceUpdate) -> pb.GenerateResponse:
    """One message; updates of the same choice are merged, as a message has at most one for each."""
    merged: dict[int, pb.SequenceUpdate] = {}
    for one in updates:
        if one.index in merged:
            merged[one.index].MergeFrom(one)
        else:
            merged[one.index] = one
    return pb.GenerateResponse(updates=merged.values())


def update(
    index: int, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs] = ()
) -> pb.SequenceUpdate:
    """New tokens of a choice."""
    return pb.SequenceUpdate(index=index, token_ids=token_ids, logprobs=logprobs)


def finish(
    index: int, reason: Any, tokens: int, nanoseconds: int = 1_000, cached: int = 0
) -> pb.SequenceUpdate:
    """The end of a choice."""
    finished = pb.Finished(
        reason=reason,
        completion_tokens=tokens,
        cached_prompt_tokens=cached,
        device_nanoseconds=nanoseconds,
    )
    return pb.SequenceUpdate(index=index, finished=finished)


def code_of(error: grpc.aio.AioRpcError) -> tuple[str, str | None]:
    """Our error code and the field it names."""
    fault = from_rpc_error(error)
    return fault.code, fault.param
