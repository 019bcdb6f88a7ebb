"""What happens to a generator and its calls when the engine itself fails."""

import asyncio
import json
import threading

import grpc
import pytest

from generator_svc.config import GeneratorSettings
from generator_svc.constraint.compiler import ConstraintCompiler
from generator_svc.cuda import CudaError
from generator_svc.run.runner import OrtRunner
from generator_svc.server import serve_constrained
from tests.generator_svc.engine_harness import Harness
from tests.generator_svc.fake_cuda import fake_cuda_device
from tests.ports import free_port
from tests.tiny_models import tiny_model_directory
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc as pb_grpc
from trivium.model_directory import load_model_directory
from trivium.wire.channel import open_channel
from trivium.wire.stop_signals import StopSignals


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_a_device_that_fails_every_run_ends_the_engine(prompt_logprobs):
    """As after an illegal memory access: a generator that fails all requests, faster than others
    answer them, would attract those of all callers. Other failed runs cost their requests only."""
    with fake_cuda_device() as cuda:
        runner = OrtRunner(load_model_directory(tiny_model_directory()), "cuda", 4, 64)
        harness = Harness(runner=runner)
        invalid = harness.submit([10_000, 5], prompt_logprobs=prompt_logprobs)
        harness.finish()
        assert invalid in harness.errors
        harness.submit([5, 6, 7], prompt_logprobs=prompt_logprobs)
        cuda.fault = 700
        with pytest.raises(CudaError, match="700"):
            harness.step()


class FailingRunner(OrtRunner):
    """Raises, as a bug would, once `is_broken`; hangs, as a driver might, once `is_stuck`."""

    is_broken = is_stuck = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.released = threading.Event()

    def run(self, plan):
        assert not self.is_broken
        if self.is_stuck:
            self.released.wait()
        return super().run(plan)


@pytest.mark.parametrize("is_draining", [False, True])
@pytest.mark.parametrize("fault", ["is_broken", "is_stuck"])
async def test_a_failed_engine_ends_its_calls_and_the_process_at_once(fault, is_draining, tmp_path):
    """With status 1, also in a drain, as calls would never finish. They have usage records."""
    model = load_model_directory(tiny_model_directory())
    port, runner = free_port(), FailingRunner(model, "cpu", 4, 2048, threads=1)
    settings = GeneratorSettings(
        model_directory=model.path,
        port=port,
        metrics_port=0,
        usage_log=str(tmp_path),
        drain_notice_seconds=0,
        drain_seconds=3_600,
        step_timeout_seconds=3,
    )
    constraints = ConstraintCompiler(model.tokenizer, model.vocab_size, (), 0)
    signals = StopSignals()
    serving = asyncio.create_task(serve_constrained(settings, model, runner, constraints, signals))
    async with asyncio.timeout(60), open_channel(f"127.0.0.1:{port}") as channel:
        call = pb_grpc.GeneratorServiceStub(channel).Generate(wait_for_ready=True)
        start = pb.StartGeneration(
            revision=model.revision, prompt_token_ids=[5, 6, 7], max_new_tokens=2000, n=8
        )
        await call.write(pb.GenerateRequest(start=start))
        messages = aiter(call)
        await anext(messages)
        if is_draining:
            signals.first.set()
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        setattr(runner, fault, True)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in messages:
                pass
        status = await serving
    runner.released.set()

    assert grpc.StatusCode.UNAVAILABLE is ended.value.code()
    assert 1 == status
    [record] = map(json.loads, (tmp_path / "generator_svc.usage.jsonl").read_text().splitlines())
    assert record["completion_tokens"] > 0
    assert record["device_nanoseconds"] > 0
