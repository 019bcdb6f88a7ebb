"""How much memory a generator takes, as the kernel counts it."""

import pytest

from bench.random_llama import Shape, make_random_llama
from tests.generator_svc.generator_process import running
from trivium.generator.v1 import generator_pb2 as pb
from trivium.model_directory import load_model_directory

MIB = 2**20
# Almost all of it are the layers' products: 381 MiB in four bits.
WIDE = Shape(2048, 8, 16, 4, 128, 11_264, 2048, 1024)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "wide"
    return load_model_directory(make_random_llama(folder, WIDE, "int4"))


async def test_weights_are_in_memory_once(model):
    """From the start through a prompt, the peak leaves no room for a second copy of the weights.

    Kernels replace the mapped file by packed copies, tensor by tensor; those take a fifth more, and
    as much of the file stays mapped.
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
    assert model.weight_bytes > 350 * MIB
    assert peak < 1.5 * model.weight_bytes + 256 * MIB
