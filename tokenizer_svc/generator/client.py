"""Calls the generator. Every failure leaves here as a ServiceError."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any

import grpc

from tokenizer_svc.generator import convert
from tokenizer_svc.generator.types import GenerateCommand, GeneratorInfo, TokenUpdate
from trivium.wire import telemetry
from trivium.wire.channel import open_channel, revision_service, serving
from trivium.wire.errors import ServiceError, from_rpc_error

INFO_SECONDS = 5.0

# The details that grpcio gives a call once a write to it has failed, whatever the peer's status.
_FAILED_WRITE = "Internal error from Core"


class GeneratorClient:
    """The generators at `target` that serve this revision of a model, behind one channel."""

    def __init__(self, target: str, revision: str) -> None:
        self._target = target
        self._revision = revision
        health_service = revision_service(convert.GENERATOR_SERVICE, revision)
        self._channel = open_channel(target, health_service)
        self._generator = convert.GeneratorStub(self._channel)

    async def close(self) -> None:
        """Ends whatever runs."""
        await self._channel.close()

    def serving(self) -> AsyncGenerator[bool]:
        """Whether any of them serves: at once, then at every change."""
        return serving(self._channel)

    async def info(self) -> GeneratorInfo:
        """What they serve."""
        return await _info(self._generator.GetModelInfo)

    async def fault(self) -> ServiceError:
        """Why none of them serves, by asking any generator that can be reached."""
        async with open_channel(self._target) as channel:
            try:
                info = await _info(convert.GeneratorStub(channel).GetModelInfo)
            except ServiceError:
                return ServiceError("backend_unavailable", "The generator cannot be reached.")
        if info.revision != self._revision:
            message = (
                f"The tokenizer serves revision {self._revision} of the model, "
                f"the generator {info.revision}."
            )
            return ServiceError("revision_mismatch", message)
        return ServiceError("model_loading", "The generator is not ready.")

    def generate(self, start: GenerateCommand, timeout: float | None) -> "GenerationCall":
        """A generation that is to take at most `timeout` seconds."""
        call = self._generator.Generate(timeout=timeout, metadata=telemetry.outgoing_metadata())
        return GenerationCall(call, start)


class GenerationCall:
    """One call of the generator. Whatever happens, it is cancelled when `messages` is closed."""

    def __init__(self, call: convert.Call, start: GenerateCommand) -> None:
        self._call = call
        self._start = start
        self._status: asyncio.Future[grpc.aio.AioRpcError] = (
            asyncio.get_running_loop().create_future()
        )
        call.add_done_callback(self._keep_status)

    async def messages(self) -> AsyncGenerator[list[TokenUpdate]]:
        """Starts the generation and yields the updates of each message."""
        try:
            await self._write(convert.start_command(self._start))
            if not self._start.options.stop:
                with suppress(grpc.aio.InternalError):  # as in `_write`
                    await self._call.done_writing()
            async for response in self._call:
                yield convert.updates(response)
        except grpc.aio.AioRpcError:
            status = await self._status
            if status.code() is not grpc.StatusCode.OK:
                raise _service_error(status) from status
        finally:
            self._call.cancel()

    async def stop(self, indices: list[int]) -> None:
        """Stops these sequences: a stop string has completed them."""
        for index in indices:
            await self._write(convert.stop_command(index))

    async def _write(self, command: convert.Command) -> None:
        # A call that is over takes no more commands; reading it raises its status.
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._call.write(command)

    def _keep_status(self, call: convert.Call) -> None:
        """Keeps the peer's status, which a write that fails before or after it would replace."""
        code, details = _result(call.code()), _result(call.details())
        if self._status.done() or details == _FAILED_WRITE:
            return
        trailing = _result(call.trailing_metadata())
        self._status.set_result(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details))


def _result(done: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        done.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("A call that is done has no status. This is a bug.")


async def _info(method: convert.GetModelInfo) -> GeneratorInfo:
    try:
        response = await method(convert.generator_info_request(), timeout=INFO_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise _service_error(error) from error
    return convert.generator_info(response)


def _service_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """Maps two statuses whose meaning differs on this hop."""
    if error.code() is grpc.StatusCode.CANCELLED:  # not by us: we would not be reading
        return ServiceError("backend_unavailable", "The generator broke off the call.")
    fault = from_rpc_error(error)
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION and fault.code == "internal_error":
        message = "The generator serves another revision of the model."
        return ServiceError("revision_mismatch", message)
    return fault
