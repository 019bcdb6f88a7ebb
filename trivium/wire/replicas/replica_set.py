"""The replicas of a target, tracked as they come and go; each call goes to one of them.

Knows nothing about the calls themselves.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from trivium.wire import tracing
from trivium.wire.errors import ServiceError, from_rpc_error, is_final
from trivium.wire.replicas.outage import Outage
from trivium.wire.replicas.replica import Replica, ReplicaState, ReplicaStatus
from trivium.wire.replicas.resolver import Address, Name, Resolver
from trivium.wire.tls.channel import ChannelTls

log = logging.getLogger(__name__)

# When the last replica is replaced, there is none until its successor is resolved and connected.
# Calls wait for that long; only a longer gap is an outage.
GAP_SECONDS = 2.0

_RESOLVE_SECONDS = 1.0
_OUTAGE_CHECK_SECONDS = 1.0
_PAUSE_SECONDS = 0.1  # before a retry on the same replica, when there is no other

# Errors that eject a replica if they keep happening.
_FAULTS = frozenset({"backend_unavailable", "internal_error"})

# The replica was lost, or never started serving. A call that reaches a server while it sends
# GOAWAY ends as CANCELLED.
LOST = frozenset({"backend_unavailable", "model_loading", "draining", "client_closed_request"})

# Of these, the ones that a call cannot have caused: retries after them need no limit.
_STARTING_OR_STOPPING = frozenset({"model_loading", "draining"})

Answer = TypeVar("Answer")
Picker = Callable[[Sequence[Replica]], Replica]


def least_outstanding(replicas: Sequence[Replica]) -> Replica:
    """The replica with the fewest of our calls in flight; round robin among equals."""
    return min(replicas, key=lambda replica: (replica.outstanding, replica.last_turn))


async def _nothing(_: Replica) -> None:
    pass


@dataclass(frozen=True)
class ReplicaSetStatus:
    """The status of all replicas, and the number of retries by error code."""

    replicas: Sequence[ReplicaStatus]
    retries: Mapping[str, int]


class ReplicaSet:
    """All replicas of `target`; those that report `health_service` as SERVING get the calls.

    `follow` runs on each connection to a replica, and is cancelled with it. With `any_reachable`,
    calls go to replicas that are not serving if none is. `refusals` are the codes of errors that
    another replica may not raise. Without `tls`, calls are in plain text. Must be created while
    the event loop runs; raises TargetError.
    """

    def __init__(
        self,
        target: str,
        health_service: str,
        follow: Callable[[Replica], Awaitable[None]] = _nothing,
        any_reachable: bool = False,
        refusals: Collection[str] = (),
        tls: ChannelTls | None = None,
    ) -> None:
        self._resolver = Resolver(target)
        self._health_service = health_service
        self._follow = follow
        self._any_reachable = any_reachable
        self._refusals = refusals
        self._tls = tls
        # All possible series exist from the start: a series that first appears at 1 has no rate.
        self._retries = {_reason(code): 0 for code in (*LOST, *refusals)}
        self._replicas: dict[Address, Replica] = {}
        self._running: dict[Replica, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._update()
        for name in self._resolver.names:
            self._start(self._follow_name(name))
        self._start(self._follow_outages())
        if tls is not None:
            self._start(self._follow_tls(tls))

    @property
    def replicas(self) -> Collection[Replica]:
        """All current replicas, whatever their state."""
        return self._replicas.values()

    def status(self) -> ReplicaSetStatus:
        """The status of all replicas; may be called from any thread."""
        replicas = [replica.status for replica in list(self._replicas.values())]
        return ReplicaSetStatus(replicas, dict(self._retries))

    @property
    def serving(self) -> list[Replica]:
        """The replicas that report SERVING."""
        return [one for one in self.replicas if one.state is ReplicaState.SERVING]

    @property
    def reachable(self) -> list[Replica]:
        """The replicas that can be reached, serving or not."""
        return [one for one in self.replicas if one.state is not ReplicaState.UNREACHABLE]

    async def changes(self) -> AsyncGenerator[bool]:
        """Whether any replica is serving: now, then whenever that may have changed."""
        while True:
            changed = self._changed
            yield bool(self.serving)
            await changed.wait()

    async def call(
        self,
        attempt: Callable[[Replica], Awaitable[Answer]],
        pick: Picker = least_outstanding,
    ) -> Answer:
        """The result of `attempt` with the replica that `pick` chooses.

        If the replica is lost, the attempt is retried once, on another replica if there is one. If
        it fails with one of `refusals`, it is retried once, on another replica only. Replicas that
        are starting or stopping are passed over as long as there are others. Waits up to
        GAP_SECONDS for a replica to pick; raises AioRpcError and ServiceError.
        """
        tried: list[Replica] = []
        retried = {"lost": False, "refused": False}
        replica = await self._pick(pick)
        while True:
            try:
                return await self._attempt(attempt, replica)
            except grpc.aio.AioRpcError as error:
                code = from_rpc_error(error).code
                if is_final(error) or (code not in LOST and code not in self._refusals):
                    raise
                tried.append(replica)
                others = _not_ejected([one for one in self.serving if one not in tried])
                # UNIMPLEMENTED means the wrong server is there, so retrying on it is no use.
                is_lost = code in LOST and error.code() is not grpc.StatusCode.UNIMPLEMENTED
                if not others and not is_lost:
                    raise
                if not others or code not in _STARTING_OR_STOPPING:
                    kind = "lost" if is_lost else "refused"
                    if retried[kind]:
                        raise
                    retried[kind] = True
            self._retries[_reason(code)] += 1
            tracing.current().event("retry", attributes={"error.type": _reason(code)})
            if others:
                replica = pick(others)
            else:
                await asyncio.sleep(_PAUSE_SECONDS)
                replica = await self._pick(pick)

    async def close(self) -> None:
        """Cancels the background tasks and closes all channels."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for replica in self._running:
            await replica.close()

    async def _attempt(
        self, attempt: Callable[[Replica], Awaitable[Answer]], replica: Replica
    ) -> Answer:
        try:
            answer = await attempt(replica)
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).code in _FAULTS and not is_final(error):
                replica.ejection.failed(time.monotonic())
            raise
        replica.ejection.succeeded()
        return answer

    async def _pick(self, pick: Picker) -> Replica:
        if not (found := self._candidates()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GAP_SECONDS):
                    while not self._candidates():
                        await self._changed.wait()
            # A busy event loop may run the timeout before it handles a replica's change.
            if not (found := self._candidates()):
                message = "The model server cannot be reached."
                raise ServiceError("backend_unavailable", message)
        return pick(found)

    def _candidates(self) -> list[Replica]:
        return _not_ejected(self.serving) or (self.reachable if self._any_reachable else [])

    async def _follow_name(self, name: Name) -> None:
        """Runs separately for each name, so that one slow lookup does not delay the others."""
        while True:
            await self._resolver.look_up(name)
            self._update()
            await asyncio.sleep(_RESOLVE_SECONDS)

    async def _follow_outages(self) -> None:
        """Warns of names that cannot be reached. One reachable address per name is enough: others
        may be starting, and metrics cover each of them."""
        outages: defaultdict[str, Outage] = defaultdict(Outage)
        while True:
            by_name = {one.address.name: one for one in self.replicas} | {
                one.address.name: one for one in self.reachable
            }
            for name, replica in by_name.items():
                reason = None
                is_there = replica in self.replicas
                if is_there and replica.state is ReplicaState.UNREACHABLE:
                    reason = await replica.why_unreachable()
                if reason is None:
                    outages[name].ended()
                else:
                    outages[name].failed(f"{name} cannot be reached", reason)
            await asyncio.sleep(_OUTAGE_CHECK_SECONDS)

    async def _follow_tls(self, tls: ChannelTls) -> None:
        async with contextlib.aclosing(tls.renewals()) as renewals:
            async for _ in renewals:
                for replica in self.replicas:
                    replica.renew()

    def _update(self) -> None:
        addresses = self._resolver.addresses
        for address in self._replicas.keys() - addresses:
            self._start(self._retire(self._replicas.pop(address)))
        for address in addresses - self._replicas.keys():
            replica = Replica(address, self._health_service, self._notify, self._follow, self._tls)
            self._replicas[address] = replica
            self._running[replica] = self._start(replica.run())

    async def _retire(self, replica: Replica) -> None:
        """Removes a replica that is gone; its calls in flight may finish."""
        self._running[replica].cancel()  # which makes it unreachable, and notifies
        await replica.close_when_idle()
        del self._running[replica]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a background task that tracks replicas failed", exc_info=task.exception())


def _not_ejected(replicas: list[Replica]) -> list[Replica]:
    """The replicas that are not ejected, or all if all are ejected."""
    return [one for one in replicas if not one.is_ejected] or replicas


def _reason(code: str) -> str:
    """Why a call is retried: client_closed_request here means the replica broke it off."""
    return "backend_unavailable" if code == "client_closed_request" else code
