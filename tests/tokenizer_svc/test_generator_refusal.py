"""The caller gets the generator's refusal, whatever had been written by then."""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from tests.tokenizer_svc.scripted_generator import (
    ScriptedGenerator,
    finish,
    message_of,
    says,
    update,
)
from tokenizer_svc.generator.client import GeneratorClient
from tokenizer_svc.generator.types import GenerateCommand
from tokenizer_svc.request.types import ValidOptions
from trivium.generator.v1 import generator_pb2 as pb
from trivium.sampling.v1.sampling_pb2 import SamplingParams
from trivium.wire.errors import ServiceError

CALLS = 200


@pytest.fixture
def refusing() -> Iterator[Callable[[str], str]]:
    """Starts a generator that refuses with this code, in its own process; returns its address."""
    with ExitStack() as stack:

        def start(code: str) -> str:
            command = [sys.executable, "-m", "tests.tokenizer_svc.refusing_generator", code]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            return f"127.0.0.1:{int(process.stdout.readline())}"

        yield start


@asynccontextmanager
async def connected(client: GeneratorClient) -> AsyncIterator[GeneratorClient]:
    """The client, once it has found the generator."""
    async for serves in client.serving():
        if serves:
            break
    yield client
    await client.close()


def start(prompt_tokens: int, *stop: str) -> GenerateCommand:
    """A command; a long prompt takes long to write."""
    options = ValidOptions(
        sampling=SamplingParams(),
        max_completion_tokens=None,
        min_tokens=0,
        ignore_eos=False,
        stop=stop,
        stop_token_ids=(),
        include_stop=False,
        skip_special_tokens=True,
        n=1,
        top_logprobs=None,
        response_constraint=None,
    )
    return GenerateCommand("r1", [7] * prompt_tokens, options, max_new_tokens=5, constraint=None)


@pytest.mark.parametrize("prompt_tokens", [10, 100_000])
@pytest.mark.parametrize("stop", [(), ("x",)])
@pytest.mark.parametrize("code", ["queue_full", "draining"])
async def test_a_call_refused_during_its_write(
    refusing: Callable[[str], str], code: str, stop: tuple[str, ...], prompt_tokens: int
) -> None:
    """Even if the write fails, the refusal and its retry time arrive, not an internal error."""
    heard: Counter[tuple[str, float | None]] = Counter()
    async with connected(GeneratorClient(refusing(code), "r1")) as client:

        async def one() -> None:
            try:
                async for _ in client.generate(start(prompt_tokens, *stop), None).messages():
                    pass
            except ServiceError as error:
                heard[error.code, error.retry_after] += 1

        await asyncio.gather(*(one() for _ in range(CALLS)))

    assert {(code, 7): CALLS} == heard


async def test_a_stop_command_after_the_end() -> None:
    """A generation that ends while it is being stopped has ended well, and all of it arrives."""
    last = message_of(update(0, [3]), finish(0, pb.FINISH_REASON_LENGTH, 3))
    messages = [message_of(update(0, [1])), message_of(update(0, [2])), last]
    generator = ScriptedGenerator("r1")
    generator.script = says(messages)
    heard: Counter[int] = Counter()
    server, port = await generator.serve()
    async with connected(GeneratorClient(f"127.0.0.1:{port}", "r1")) as client:

        async def one() -> None:
            generation, count = client.generate(start(10, "x"), None), 0
            async for _ in generation.messages():
                count += 1
                await generation.stop([0])
            heard[count] += 1

        await asyncio.gather(*(one() for _ in range(CALLS)))

    await server.drain(0, 0)
    assert {len(messages): CALLS} == heard


class BehindAMesh(ScriptedGenerator):
    """A proxy in front of it refuses Generate."""

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied")
        yield


async def test_a_proxys_status_is_not_revealed(caplog: pytest.LogCaptureFixture) -> None:
    """Callers do not see its details; it is logged once, with the replica that returned it."""
    server, port = await BehindAMesh("r1").serve()
    async with connected(GeneratorClient(f"127.0.0.1:{port}", "r1")) as client:
        with pytest.raises(ServiceError) as refused:
            async for _ in client.generate(start(10), None).messages():
                pass
    await server.drain(0, 0)

    assert ("internal_error", False) == (refused.value.code, "RBAC" in refused.value.message)
    assert [f"replica 127.0.0.1:{port} returned PERMISSION_DENIED: RBAC: access denied"] == [
        record.getMessage() for record in caplog.records if record.levelname == "ERROR"
    ]
