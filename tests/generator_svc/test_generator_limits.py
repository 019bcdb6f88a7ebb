"""The generator in a real cgroup: it stays within the limits, or says that they are too low."""

import json

import pytest

from tests.generator_svc.control_group import CgroupUnavailable, limited
from tests.generator_svc.generator_process import non_log_lines, refusal, running
from tests.tiny_models import tiny_model_directory
from trivium.generator.v1 import generator_pb2 as pb
from trivium.model_directory import load_model_directory

MIB = 2**20
SLOT_BYTES = 2 * 3 * 2 * 2048 * 16 * 4  # of the tiny model: 1.5 MiB


@pytest.fixture(scope="module")
def model():
    return load_model_directory(tiny_model_directory())


@pytest.fixture
def group(request):
    """The prefix for commands in a cgroup with this much memory in MiB and this many CPUs."""
    memory_mib, cpus = request.param
    groups = limited(memory_mib * MIB, cpus)
    try:
        prefix = groups.__enter__()
    except CgroupUnavailable as error:
        pytest.skip(f"cannot create a cgroup: {error}")
    yield prefix
    groups.__exit__(None, None, None)


@pytest.mark.parametrize("group", [(200, 1)], indirect=True)
async def test_too_small_container_is_refused(model, group):
    """Instead of being killed: it names the limit and what is needed, and exits with status 2."""
    status, stderr = await refusal(*group, model_directory=model.path, device="cpu")

    [line] = non_log_lines(stderr)
    assert 2 == status
    for part in ("200 MiB", "memory limit in /sys/fs/cgroup", "for weights", "provide"):
        assert part in line


@pytest.mark.parametrize("group", [(512, 1.5)], indirect=True)
async def test_small_container_gets_a_smaller_cache(model, group):
    """Slots fit into the limit, threads do not exceed the quota, and all slots can be used."""
    settings = {"device": "cpu", "slots": 4096, "threads": 0}
    async with running(*group, model_directory=model.path, **settings) as generator:
        info = await generator.stub.GetModelInfo(pb.GetModelInfoRequest())
        long = {"max_new_tokens": 40, "ignore_eos": True, "n": 64}
        prompt = [5 + i % 500 for i in range(1990)]
        start = pb.StartGeneration(revision=model.revision, prompt_token_ids=prompt, **long)
        call = generator.stub.Generate()
        await call.write(pb.GenerateRequest(start=start))
        await call.done_writing()
        tokens = sum([len(u.token_ids) async for message in call for u in message.updates])
        generator.terminate()
        status, stderr = await generator.ended()

    log = "\n".join(json.loads(line)["message"] for line in stderr.splitlines())
    assert (0, 64 * 40) == (status, tokens)
    assert 16 <= info.slots <= 256 * MIB // SLOT_BYTES
    assert "1 core (quota of 1.5 CPUs in /sys/fs/cgroup" in log
    assert "threads per run on the CPU: 1" in log
