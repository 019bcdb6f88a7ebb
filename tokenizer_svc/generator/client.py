"""Calls the generators; every failure is raised as a ServiceError."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import grpc

from tokenizer_svc.generator import convert
from tokenizer_svc.generator.load import SentGeneration
from tokenizer_svc.generator.picker import Candidate, GeneratorPicker
from tokenizer_svc.generator.prefix_memory import BLOCK_TOKENS, Prefixes, prefixes
from tokenizer_svc.generator.types import (
    CompletionReport,
    GenerateCommand,
    GeneratorInfo,
    TokenUpdate,
)
from trivium.keys.own_key import OwnKey, own_metadata
from trivium.wire import telemetry
from trivium.wire.channel import revision_service
from trivium.wire.errors import ServiceError, from_rpc_error, is_foreign
from trivium.wire.replicas.outage import Outage
from trivium.wire.replicas.replica import Replica
from trivium.wire.replicas.replica_set import ReplicaSet
from trivium.wire.tls.channel import ChannelTls

INFO_SECONDS = 5.0
_LOAD_RETRY_SECONDS = 1.0

# The details that grpcio gives a call after a failed write, whatever the peer's status.
_FAILED_WRITE = "Internal error from Core"


class GeneratorClient:
    """Client of the generators at `target` that serve this revision of a model.

    `key` authenticates this stage. Without `tls`, calls are in plain text. Must be created while
    the event loop runs; raises TargetError.
    """

    def __init__(
        self,
        target: str,
        revision: str,
        key: OwnKey | None = None,
        tls: ChannelTls | None = None,
    ) -> None:
        self._key = key
        self._revision = revision
        health_service = revision_service(convert.GENERATOR_SERVICE, revision)
        self._picker = GeneratorPicker()
        self._candidates: WeakKeyDictionary[Replica, Candidate] = WeakKeyDictionary()
        self._load_outages: WeakKeyDictionary[Replica, Outage] = WeakKeyDictionary()
        self.replicas = ReplicaSet(
            target,
            health_service,
            self._watch_load,
            # Processes do not all reload changed keys at once.
            refusals=["queue_full", "invalid_api_key"],
            tls=tls,
        )

    async def close(self) -> None:
        """Closes all channels."""
        await self.replicas.close()

    def serving(self) -> AsyncGenerator[bool]:
        """Yields whether any generator is serving: now, then whenever that may have changed."""
        return self.replicas.changes()

    async def info(self) -> GeneratorInfo:
        """What the generators serve; raises ServiceError."""
        try:
            return await self.replicas.call(self._info)
        except grpc.aio.AioRpcError as error:
            raise _service_error(error) from error

    async def fault(self) -> ServiceError:
        """Why no generator is serving, by asking any that can be reached."""
        for replica in self.replicas.reachable:
            try:
                info = await self._info(replica)
            except grpc.aio.AioRpcError:
                continue
            if info.revision != self._revision:
                message = (
                    f"The tokenizer serves revision {self._revision} of the model, "
                    f"the generator {info.revision}."
                )
                return ServiceError("revision_mismatch", message)
            return ServiceError("model_loading", "The generator is not ready.")
        return ServiceError("backend_unavailable", "The generator cannot be reached.")

    def generate(self, start: GenerateCommand, timeout: float | None) -> "Generation":
        """A generation that may take at most `timeout` seconds."""
        return Generation(self, start, timeout)

    def candidate(self, replica: Replica) -> Candidate:
        """What this process knows about one of `replicas`."""
        if replica not in self._candidates:
            self._candidates[replica] = Candidate(str(replica.address))
        return self._candidates[replica]

    def pick(self, replicas: Sequence[Replica], prompt: Prefixes) -> Replica:
        """The replica to send a prompt to."""
        candidates = [self.candidate(replica) for replica in replicas]
        return replicas[candidates.index(self._picker.pick(candidates, prompt))]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of an outgoing call: the current request's, and this stage's key."""
        return telemetry.outgoing_metadata() + own_metadata(self._key)

    async def _info(self, replica: Replica) -> GeneratorInfo:
        call = self._get_model_info(replica.stub(convert.GeneratorStub))
        return convert.generator_info(await replica.track(call))

    def _get_model_info(self, stub: convert.GeneratorStub) -> Any:
        """Starts a GetModelInfo call."""
        request, metadata = convert.generator_info_request(), own_metadata(self._key)
        return stub.GetModelInfo(request, timeout=INFO_SECONDS, metadata=metadata)

    async def _watch_load(self, replica: Replica) -> None:
        candidate = self.candidate(replica)
        load, outage = candidate.load, self._load_outages.setdefault(replica, Outage())
        stub = replica.stub(convert.GeneratorStub)
        while True:
            try:
                info = convert.generator_info(await self._get_model_info(stub))
                candidate.connected(info.instance_id)
                async for response in stub.WatchLoad(
                    convert.load_request(), metadata=own_metadata(self._key)
                ):
                    load.update(convert.load_report(response))
                    outage.ended()
            except grpc.aio.AioRpcError as error:
                if is_foreign(error):  # lost replicas are logged elsewhere
                    reason = f"{error.code().name}: {error.details()}"
                    outage.failed(f"{replica.address} does not report its load", reason)
            finally:
                load.update(None)
            await asyncio.sleep(_LOAD_RETRY_SECONDS)


class Generation:
    """One generation, on a generator with capacity for it.

    Until its first message arrives it is retried once, on another generator if there is one.
    Closing `messages` always cancels the call.
    """

    def __init__(
        self, client: GeneratorClient, start: GenerateCommand, timeout: float | None
    ) -> None:
        self._client = client
        self._start = start
        self._prompt = prefixes(start.token_ids)
        self._clock = asyncio.get_running_loop().time
        self._deadline = None if timeout is None else self._clock() + timeout
        self._call: _GenerationCall | None = None

    async def messages(self) -> AsyncGenerator[list[TokenUpdate]]:
        """Starts the generation and yields the updates of each message."""
        try:
            response = await self._first()
            while response is not None:
                if response.prompt_logprobs:  # may be many, and would delay all streams
                    yield await asyncio.to_thread(convert.updates, response)
                else:
                    yield convert.updates(response)
                assert self._call is not None
                response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _service_error(error) from error
        finally:
            self._cancel()

    async def stop(self, indices: list[int]) -> None:
        """Stops these sequences, in which a stop string was found."""
        for index in indices:
            assert self._call is not None, "Only what has begun can be stopped."
            await self._call.write(convert.stop_command(index))

    async def report(self, report: CompletionReport) -> None:
        """Sends the report once all tokens have arrived; `messages` then ends."""
        assert self._call is not None, "Only what has begun can be reported on."
        await self._call.write(convert.report_command(report))

    async def _first(self) -> convert.Response | None:
        try:
            return await self._client.replicas.call(self._begin, self._pick)
        except grpc.aio.AioRpcError as error:
            fault = _service_error(error)
            # It was retried already, or there was no other generator: callers should not retry.
            raise ServiceError(
                fault.code, fault.message, fault.param, fault.retry_after, everywhere=True
            ) from error

    def _pick(self, replicas: Sequence[Replica]) -> Replica:
        return self._client.pick(replicas, self._prompt)

    async def _begin(self, replica: Replica) -> convert.Response | None:
        self._cancel()
        timeout = None if self._deadline is None else max(self._deadline - self._clock(), 0.0)
        metadata = self._client.metadata()
        stub = replica.stub(convert.GeneratorStub)
        call = replica.track(stub.Generate(timeout=timeout, metadata=metadata))
        candidate = self._client.candidate(replica)
        known = candidate.memory.known_blocks(self._prompt)
        sent = SentGeneration(
            self._start.options.n, len(self._start.token_ids) - BLOCK_TOKENS * known
        )
        candidate.memory.add(self._prompt)
        candidate.load.add(sent)
        call.add_done_callback(lambda _: candidate.load.remove(sent))
        self._call = _GenerationCall(call, replica)
        try:
            return await self._call.start(self._start)
        except grpc.aio.AioRpcError:
            candidate.memory.remove(self._prompt, known)
            raise

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()


class _GenerationCall:
    """One call to one generator."""

    def __init__(self, call: convert.Call, replica: Replica) -> None:
        self._call = call
        self._replica = replica
        # Unlike `read`, this yields all messages received, even once the call has ended.
        self._responses = aiter(call)
        self._status: asyncio.Future[grpc.aio.AioRpcError] = (
            asyncio.get_running_loop().create_future()
        )
        call.add_done_callback(self._keep_status)

    def cancel(self) -> None:
        """Cancels the call if it is still running."""
        self._call.cancel()

    async def start(self, start: GenerateCommand) -> convert.Response | None:
        """Starts the generation; returns its first message. Raises AioRpcError."""
        await self.write(convert.start_command(start))
        return await self.read()

    async def read(self) -> convert.Response | None:
        """The next message, or None at the end; raises AioRpcError."""
        try:
            return await anext(self._responses, None)
        except grpc.aio.AioRpcError:
            status = await self._status
            if status.code() is grpc.StatusCode.OK:
                return None
            self._replica.log_foreign(status)
            raise status from None

    async def write(self, command: convert.Command) -> None:
        """Sends a command; ignored once the call has ended, as reading it raises its status."""
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._call.write(command)

    def _keep_status(self, call: convert.Call) -> None:
        """Keeps the peer's status, which a failed write before or after it would replace."""
        code, details = _result(call.code()), _result(call.details())
        if self._status.done() or details == _FAILED_WRITE:
            return
        trailing = _result(call.trailing_metadata())
        self._status.set_result(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details))


def _result(done: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never suspends."""
    try:
        done.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("A call that is done has no status. This is a bug.")


def _service_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """Maps statuses whose meaning differs on this hop."""
    if error.code() is grpc.StatusCode.CANCELLED:  # not by us, or we would not be reading
        return ServiceError("backend_unavailable", "The connection to the generator was lost.")
    fault = from_rpc_error(error)
    if fault.code == "invalid_api_key":  # our key, not the caller's
        message = f"The generator refuses the tokenizer's key: {fault.message}"
        return ServiceError("backend_unavailable", message)
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION and fault.code == "internal_error":
        message = "The generator serves another revision of the model."
        return ServiceError("revision_mismatch", message)
    return fault
