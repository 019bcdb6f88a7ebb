"""How much memory a generator takes, as the kernel counts it."""

import pytest

from bench.random_llama import Shape, make_random_llama
from tests.generator_svc.generator_process import running
from trivium.generator.v1 import generator_pb2 as pb
from trivium.model_directory import load_model_directory

MIB = 2**20


@pytest.fixture(params=[("int4", 8), ("int8", 4), ("fp32", 1)], ids=lambda param: param[0])
def model(request, tmp_path):
    """Almost all of its 330 to 400 MiB are the matrices of its layers."""
    precision, layers = request.param
    shape = Shape(2048, layers, 16, 4, 128, 11_264, 2048, 1024)
    return load_model_directory(make_random_llama(tmp_path / "wide", shape, precision))


async def test_weights_are_in_memory_once(model):
    """From the start through a prompt, the peak leaves no room for a second copy of the weights.

    Kernels replace the mapped file by packed copies, tensor by tensor. Those may take a fifth more,
    and a fifth of the file, the scales, stays mapped.
    """
    settings = {"device": "cpu", "slots": 2, "max_sequence_length": 256}
    async with running(model_directory=model.path, **settings) as generator:
        prompt = [5 + i % 500 for i in range(128)]
        start = pb.StartGeneration(
            revision=model.revision, prompt_token_ids=prompt, max_new_tokens=2, ignore_eos=True
        )
        call = generator.stub.Generate()
        await call.write(pb.GenerateRequest(start=start))
        await call.done_writing()
        tokens = sum([len(u.token_ids) async for message in call for u in message.updates])
        peak = generator.peak_bytes()

    assert 2 == tokens
    assert model.weight_bytes > 300 * MIB
    assert peak < 1.5 * model.weight_bytes + 256 * MIB
