"""One replica of the next stage: its channel, whether it serves, and the calls it has of ours."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trivium.wire.channel import open_channel
from trivium.wire.replicas.resolver import Address

log = logging.getLogger(__name__)

_WATCH_RETRY_SECONDS = 0.2
# Connections end when they are old and are there again at once, of which nobody has to be told.
_LOST_SECONDS = 1.0

_turns = itertools.count(1)

Call = TypeVar("Call", bound=grpc.aio.Call)
Stub = TypeVar("Stub")


class ReplicaState(Enum):
    """What is known of a replica; the value is its name in metrics."""

    UNREACHABLE = "unreachable"
    NOT_SERVING = "not_serving"
    SERVING = "serving"


@dataclass(frozen=True)
class ReplicaStatus:
    """How a replica is: calls that have not ended, and all that ever began."""

    address: str
    state: ReplicaState
    outstanding: int
    picked: int


class Replica:
    """A process of a stage at one address, or whatever a proxy there makes of it.

    `outstanding` are calls that have begun and not ended, `picked` all that ever began; the later
    the last one began, the larger is `last_turn`. `changed` is called whenever `state` has;
    `follow` runs for as long as a connection lasts.
    """

    def __init__(
        self,
        address: Address,
        health_service: str,
        changed: Callable[[], None],
        follow: Callable[["Replica"], Awaitable[None]],
    ) -> None:
        self.address = address
        self.state = self._told = ReplicaState.UNREACHABLE
        self.outstanding = 0
        self.picked = 0
        self.last_turn = 0
        self._channel = open_channel(address.target, address.authority)
        self._health_service = health_service
        self._changed = changed
        self._follow = follow
        self._stubs: dict[Any, Any] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def status(self) -> ReplicaStatus:
        """How it is now."""
        return ReplicaStatus(str(self.address), self.state, self.outstanding, self.picked)

    def stub(self, kind: Callable[[grpc.aio.Channel], Stub]) -> Stub:
        """The stub of this class on this replica's channel."""
        if kind not in self._stubs:
            self._stubs[kind] = kind(self._channel)
        return cast("Stub", self._stubs[kind])

    def track(self, call: Call) -> Call:
        """Counts a call until it ends."""
        self.outstanding += 1
        self.picked += 1
        self.last_turn = next(_turns)
        self._idle.clear()
        call.add_done_callback(self._ended)
        return call

    def _ended(self, _: object) -> None:
        self.outstanding -= 1
        if not self.outstanding:
            self._idle.set()

    async def run(self) -> None:
        """Keeps a connection and watches the health on it, for good."""
        try:
            while True:
                connection = self._channel.get_state(try_to_connect=True)
                watching: list[asyncio.Future[None]] = []
                if connection is grpc.ChannelConnectivity.READY:
                    # Anew on each connection: behind a proxy it may lead to another process.
                    watching = [
                        asyncio.ensure_future(self._watch_health()),
                        asyncio.ensure_future(self._follow(self)),
                    ]
                try:
                    await self._channel.wait_for_state_change(connection)
                finally:
                    for task in watching:
                        task.cancel()
                    await asyncio.gather(*watching, return_exceptions=True)
                    self._set(ReplicaState.UNREACHABLE)
        finally:
            self._set(ReplicaState.UNREACHABLE)

    async def close_when_idle(self) -> None:
        """Returns when the calls that run have ended, and the channel with them."""
        await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Ends whatever runs."""
        await self._channel.close()

    async def _watch_health(self) -> None:
        request = health_pb2.HealthCheckRequest(service=self._health_service)
        while True:
            heard = False
            try:
                async for response in self.stub(health_pb2_grpc.HealthStub).Watch(request):
                    heard = True
                    serving = response.status == health_pb2.HealthCheckResponse.SERVING
                    self._set(ReplicaState.SERVING if serving else ReplicaState.NOT_SERVING)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    # As gRPC itself has it: one who has no health is taken for healthy.
                    self._set(ReplicaState.SERVING)
                    return
            # A proxy ends a watch on which nothing happens; it is good as long as the next one is.
            if not heard:
                self._set(ReplicaState.UNREACHABLE)
            await asyncio.sleep(_WATCH_RETRY_SECONDS)

    def _set(self, state: ReplicaState) -> None:
        if state is self.state:
            return
        self.state = state
        self._changed()
        if state is ReplicaState.UNREACHABLE:
            asyncio.get_running_loop().call_later(_LOST_SECONDS, self._tell)
        else:
            self._tell()

    def _tell(self) -> None:
        if self.state is not self._told:
            log.info("%s is %s", self.address, self.state.value)
            self._told = self.state
