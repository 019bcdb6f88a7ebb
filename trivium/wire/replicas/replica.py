"""One replica of the next stage: its channel, its health, and our calls in flight on it."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trivium.wire.channel import open_channel
from trivium.wire.errors import is_foreign
from trivium.wire.replicas.ejection import Ejection
from trivium.wire.replicas.resolver import Address
from trivium.wire.tls.channel import ChannelTls

log = logging.getLogger(__name__)

_WATCH_RETRY_SECONDS = 0.2
# Connections that reach their maximum age are re-established at once, which need not be logged.
_LOG_DELAY_SECONDS = 1.0
_CHECK_SECONDS = 1.0

_turns = itertools.count(1)

Call = TypeVar("Call", bound=grpc.aio.Call)
Stub = TypeVar("Stub")


class ReplicaState(Enum):
    """What is known about a replica; the value is its name in metrics."""

    UNREACHABLE = "unreachable"
    NOT_SERVING = "not_serving"
    SERVING = "serving"


@dataclass(frozen=True)
class ReplicaStatus:
    """A replica's state, its calls in flight, all calls so far, and how often it was ejected."""

    address: str
    state: ReplicaState
    outstanding: int
    picked: int
    ejections: int


class _Link:
    """A channel to a replica, and the calls on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.replaced = asyncio.Event()  # new calls use another link from now on
        self.outstanding = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._stubs: dict[Any, Any] = {}

    def stub(self, kind: Callable[[grpc.aio.Channel], Stub]) -> Stub:
        if kind not in self._stubs:
            self._stubs[kind] = kind(self.channel)
        return cast("Stub", self._stubs[kind])

    def began(self) -> None:
        self.outstanding += 1
        self.idle.clear()

    def ended(self) -> None:
        self.outstanding -= 1
        if not self.outstanding:
            self.idle.set()


class Replica:
    """A process of a stage at one address, or whatever a proxy at that address forwards to.

    `outstanding` counts calls in flight, `picked` all calls so far; the later the latest call
    began, the larger is `last_turn`. `changed` is called whenever `state` changes; `follow` runs
    for as long as a connection lasts.
    """

    def __init__(
        self,
        address: Address,
        health_service: str,
        changed: Callable[[], None],
        follow: Callable[["Replica"], Awaitable[None]],
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self.state = self._logged_state = ReplicaState.UNREACHABLE
        self.outstanding = 0
        self.picked = 0
        self.last_turn = 0
        self.ejection = Ejection()
        self._tls = tls
        self._link = _Link(self._open())
        self._replaced: dict[_Link, asyncio.Task[None]] = {}  # open until their calls end
        self._renewing: asyncio.Task[None] | None = None
        self._health_service = health_service
        self._changed = changed
        self._follow = follow

    @property
    def status(self) -> ReplicaStatus:
        """Its current status."""
        return ReplicaStatus(
            str(self.address), self.state, self.outstanding, self.picked, self.ejection.count
        )

    @property
    def is_ejected(self) -> bool:
        """Whether it is ejected, because its recent calls kept failing."""
        return self.ejection.is_ejected(time.monotonic())

    def stub(self, kind: Callable[[grpc.aio.Channel], Stub]) -> Stub:
        """The stub of class `kind`, for a new call."""
        return self._link.stub(kind)

    def track(self, call: Call) -> Call:
        """Counts a call that a stub has just started, until it ends."""
        link = self._link
        self.outstanding += 1
        self.picked += 1
        self.last_turn = next(_turns)
        link.began()

        def ended(_: object) -> None:
            self.outstanding -= 1
            link.ended()

        call.add_done_callback(ended)
        return call

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Wraps the reading of a response: callers get no details of a status that no stage
        raised, so it is logged."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            self.log_foreign(error)
            raise

    def log_foreign(self, error: grpc.aio.AioRpcError) -> None:
        """Logs the status that this replica returned, unless a stage raised it."""
        if is_foreign(error):
            log.error(
                "replica %s returned %s: %s", self.address, error.code().name, error.details()
            )

    async def why_unreachable(self) -> str | None:
        """The reason, found by a call, as a channel does not expose it; None if it is reachable."""
        request = health_pb2.HealthCheckRequest(service=self._health_service)
        link = self._link
        link.began()  # so that it is not closed in the meantime
        try:
            await link.stub(health_pb2_grpc.HealthStub).Check(request, timeout=_CHECK_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:  # it reports other services only
                return None
            return f"{error.code().name}: {error.details()}"
        finally:
            link.ended()
        return None

    def renew(self) -> None:
        """Reconnects with the current TLS files. New calls use the old connection until the new one
        is ready."""
        if self._renewing is not None:
            self._renewing.cancel()
        self._renewing = asyncio.create_task(self._renew())

    async def run(self) -> None:
        """Keeps a connection open and watches the replica's health on it, until cancelled."""
        try:
            while True:
                await self._run_connection(self._link)
        finally:
            if self._renewing is not None:
                self._renewing.cancel()
                await asyncio.gather(self._renewing, return_exceptions=True)
            self._set(ReplicaState.UNREACHABLE)

    async def close_when_idle(self) -> None:
        """Closes all channels once the calls in flight have ended."""
        await asyncio.gather(self._link.idle.wait(), *self._replaced.values())
        await self.close()

    async def close(self) -> None:
        """Closes all channels, which ends the calls in flight."""
        for link, closing in self._replaced.copy().items():
            closing.cancel()
            await link.channel.close()
        await self._link.channel.close()

    def _open(self) -> grpc.aio.Channel:
        return open_channel(self.address.target, self.address.authority, self._tls)

    async def _renew(self) -> None:
        channel = self._open()
        try:
            connection = channel.get_state(try_to_connect=True)
            while connection is not grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(connection)
                connection = channel.get_state(try_to_connect=True)
        except BaseException:
            await channel.close()
            raise
        replaced, self._link = self._link, _Link(channel)
        self._replaced[replaced] = asyncio.create_task(self._close_when_idle(replaced))
        replaced.replaced.set()

    async def _close_when_idle(self, link: _Link) -> None:
        await link.idle.wait()
        await link.channel.close()
        del self._replaced[link]

    async def _run_connection(self, link: _Link) -> None:
        """Returns when the connection's state changes or the link is replaced."""
        connection = link.channel.get_state(try_to_connect=True)
        changes: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(link.channel.wait_for_state_change(connection)),
            asyncio.ensure_future(link.replaced.wait()),
        ]
        watching: list[asyncio.Future[None]] = []
        if connection is grpc.ChannelConnectivity.READY:
            # Once per connection: behind a proxy, a new one may lead to another process.
            watching = [
                asyncio.ensure_future(self._watch_health()),
                asyncio.ensure_future(self._follow(self)),
            ]
        try:
            await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*watching, *changes):
                task.cancel()
            await asyncio.gather(*watching, *changes, return_exceptions=True)
            if not link.replaced.is_set():
                self._set(ReplicaState.UNREACHABLE)

    async def _watch_health(self) -> None:
        request = health_pb2.HealthCheckRequest(service=self._health_service)
        while True:
            has_responded = False
            try:
                async for response in self.stub(health_pb2_grpc.HealthStub).Watch(request):
                    has_responded = True
                    serving = response.status == health_pb2.HealthCheckResponse.SERVING
                    self._set(ReplicaState.SERVING if serving else ReplicaState.NOT_SERVING)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    # As in gRPC itself: a server without a health service counts as healthy.
                    self._set(ReplicaState.SERVING)
                    return
            # A proxy ends an idle watch; the replica stays healthy if the next watch succeeds.
            if not has_responded:
                self._set(ReplicaState.UNREACHABLE)
            await asyncio.sleep(_WATCH_RETRY_SECONDS)

    def _set(self, state: ReplicaState) -> None:
        if state is self.state:
            return
        self.state = state
        self._changed()
        if state is ReplicaState.UNREACHABLE:
            asyncio.get_running_loop().call_later(_LOG_DELAY_SECONDS, self._log_state)
        else:
            self._log_state()

    def _log_state(self) -> None:
        if self.state is not self._logged_state:
            log.info("replica %s is %s", self.address, self.state.value)
            self._logged_state = self.state
