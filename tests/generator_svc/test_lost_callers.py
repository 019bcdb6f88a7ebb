"""Callers that vanish without closing the connection, frozen or cut off, keep no resources."""

import asyncio
import signal
import sys

import pytest

from tests.generator_svc.generator_stage import REVISION, Stage, by_last_token

CALLER = f"""
import asyncio, sys
import grpc
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc as pb_grpc

async def main():
    async with grpc.aio.insecure_channel("127.0.0.1:" + sys.argv[1]) as channel:
        call = pb_grpc.GeneratorServiceStub(channel).Generate()
        start = pb.StartGeneration(revision={REVISION!r}, prompt_token_ids=[5], ignore_eos=True)
        await call.write(pb.GenerateRequest(start=start))
        async for _ in call:
            print("a message", flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_unresponsive_client_does_not_keep_its_slot():
    """Its connection is open and accepts data; that no one is there is detected within 20 s."""
    stage = Stage(slot_length=100_000, logits=by_last_token)
    async with stage.running():
        stage.runner.delay = 0.02
        caller = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CALLER, str(stage.port)), stdout=asyncio.subprocess.PIPE
        )
        assert b"a message\n" == await caller.stdout.readline()
        caller.send_signal(signal.SIGSTOP)
        try:
            await stage.until_free()
        finally:
            caller.kill()
            await caller.communicate()
