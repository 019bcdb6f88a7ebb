"""The CUDA code path: on a device where there is one, and everywhere on a fake one."""

import contextlib
import ctypes
import itertools
import time

import numpy as np
import pytest

from bench.random_llama import SHAPES, make_random_llama
from generator_svc.config import GeneratorSettings
from generator_svc.cuda import CudaClock, CudaError, copy_to_host
from generator_svc.device import Device
from generator_svc.metering import Meter
from generator_svc.plan import Chunk, Copy, PromptBatch, Row, StepPlan, Swap
from generator_svc.run.cuda_memory import CudaMemory
from generator_svc.run.runner import OrtRunner
from generator_svc.run.slot_memory import HostMemory
from generator_svc.sampling.device_row import CANDIDATES, RELATIVE_ERROR, DeviceRow
from generator_svc.sequence import SamplingParams
from generator_svc.startup import load_runner, warm_up
from tests.generator_svc.engine_harness import Harness
from tests.generator_svc.fake_cuda import fake_cuda_device, fake_cuda_runtime
from trivium.model_directory import load_model_directory

PROMPT = tuple(range(5, 45))


@pytest.fixture
def runtime():
    """A fake one, on which 1.5 ms pass between any two events."""
    with fake_cuda_runtime(itertools.count(0, 1_500_000).__next__) as runtime:
        yield runtime


def _slot(memory, tensor, slot):
    """What a slot holds, [kv_heads, slot_length, head_size]."""
    count = int(np.prod(memory.shape[1:]))
    numbers = (ctypes.c_float * count).from_address(memory.address(tensor, slot))
    return np.frombuffer(numbers, np.float32).reshape(memory.shape[1:])


@pytest.mark.usefixtures("runtime")
def test_slots_move_as_in_main_memory():
    """Copies and swaps of parts of slots, in every tensor and head."""
    shape = (3, 2, 10, 4)
    memories = [HostMemory(4, shape, np.float32), CudaMemory(4, shape, np.float32)]
    for memory in memories:
        random = np.random.default_rng(0)
        for tensor in range(4):
            for slot in range(3):
                _slot(memory, tensor, slot)[:] = random.random(shape[1:], np.float32)
        memory.copy(0, 2, 7)
        memory.swap(1, 2, 3)

    assert memories[0].size_in_bytes == memories[1].size_in_bytes
    for tensor in range(4):
        for slot in range(3):
            on_host, on_device = (_slot(memory, tensor, slot).tolist() for memory in memories)
            assert on_host == on_device


def test_time_is_taken_between_events_on_the_stream(runtime):
    """Both are on the clock's own stream, and the second is waited for; whole nanoseconds."""
    clock = CudaClock()
    clock.start()
    spent = clock.stop()

    (_, began, stream), (_, ended, same), *rest = runtime.calls
    assert (1_500_000, clock.stream, clock.stream) == (spent, stream, same)
    assert [("wait", ended), ("time", began, ended)] == rest
    assert len({began, ended, stream}) == 3


def test_rows_come_from_the_device(runtime):
    """Their bytes are copied unchanged from device to host; a failed copy is an error."""
    source, target = np.arange(9, dtype=np.float32), np.zeros(9, np.float32)
    copy_to_host(target.ctypes.data, source.ctypes.data, source.nbytes)

    assert (source.tolist(), [("copy", 2)]) == (target.tolist(), runtime.calls)
    runtime.cudaMemcpy = lambda *arguments: 700
    with pytest.raises(CudaError, match="cudaMemcpy of 36 bytes failed with CUDA error 700"):
        copy_to_host(target.ctypes.data, source.ctypes.data, source.nbytes)


# ---- with a device, fake or real


@pytest.fixture(scope="module", params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def device(request):
    with fake_cuda_device() if request.param == "simulated" else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "int4"])
def model(request, device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda") / "small"
    return load_model_directory(
        make_random_llama(folder, SHAPES["small"], request.param, device="cuda")
    )


@pytest.fixture(scope="module")
def on_device(model):
    """Loaded as the service loads it, without CUDA graphs."""
    return _loaded(model, cuda_graphs=False)


@pytest.fixture(scope="module")
def capturing(model):
    """The same, with decode steps as CUDA graphs where possible: not in float32."""
    return _loaded(model, cuda_graphs=True)


@pytest.fixture(params=["eager", "captured"])
def either(request, on_device, capturing):
    return {"eager": on_device, "captured": capturing}[request.param]


def _loaded(model, cuda_graphs):
    settings = GeneratorSettings(
        model_directory=model.path,
        device="cuda",
        slots=4,
        max_sequence_length=128,
        cuda_graphs=cuda_graphs,
    )
    runner = load_runner(settings, model)
    warm_up(settings, runner, Meter())
    return runner


def _prefill(runner, slot, token_ids=PROMPT):
    result = runner.run(StepPlan(chunks=(Chunk(slot, 0, token_ids, True),))).chunks[0]
    assert result.error is None
    return result.logits[0]


def test_provider_logits_and_timing_are_on_the_device(on_device):
    """The provider, the logits, and the time, which comes from the device's events."""
    began = time.perf_counter_ns()
    result = on_device.run(StepPlan(chunks=(Chunk(0, 0, PROMPT, True),))).chunks[0]
    passed = time.perf_counter_ns() - began

    assert "CUDAExecutionProvider" == on_device.info.provider
    assert isinstance(Device("cuda").clock, CudaClock)
    assert isinstance(result.logits[0], DeviceRow)
    assert 0 < result.nanoseconds <= passed


def test_logits_are_nearly_those_of_the_cpu(on_device, model):
    """Only rounding differs, as other kernels are used, some of them in TF32."""
    expected = _prefill(OrtRunner(model, "cpu", 1, 128), 0)

    assert np.allclose(expected, _prefill(on_device, 0).whole, atol=0.15)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_decode_logits_do_not_depend_on_earlier_runs(either, model, rows):
    """After steps and prompts of other lengths they are those of a fresh runner."""
    for slot in range(4):
        _prefill(either, slot, PROMPT[::-1])
    either.run(StepPlan(rows=tuple(Row(7, 40) for _ in range(rows))))
    logits = []
    for runner in (OrtRunner(model, "cuda", 4, 128), either):
        for slot in range(rows):
            _prefill(runner, slot, PROMPT[: 10 * (slot + 1)])
        plan = StepPlan(rows=tuple(Row(7, 10 * (slot + 1)) for slot in range(rows)))
        logits.append([np.array(row) for row in runner.run(plan).rows.logits])

    assert np.allclose(*logits, atol=0.05)


def test_candidates_are_those_of_the_whole_row(on_device):
    """For every row of a batch, each at its own position."""
    for slot in range(4):
        _prefill(on_device, slot, PROMPT[: 10 * (slot + 1)])
    rows = tuple(Row(7, 10 * (slot + 1)) for slot in range(4))
    greedy = on_device.run(StepPlan(rows=tuple(row._replace(temperature=None) for row in rows)))
    best = [(row.token_id, row.is_certain) for row in greedy.rows.logits]
    expected = [(int(row.fetch().argmax()), True) for row in greedy.rows.logits]

    assert expected == best
    for row in on_device.run(StepPlan(rows=rows)).rows.logits:
        largest = np.sort(row.whole)[::-1][:CANDIDATES]
        rest = np.exp(row.whole - largest[0])[row.whole <= largest[-1]].sum()

        assert largest.tolist() == row.values.tolist() == row.whole[row.ids].tolist()
        assert len(set(row.ids.tolist())) == CANDIDATES
        assert abs(row.rest.sum() / rest - 1) < RELATIVE_ERROR


@pytest.mark.parametrize("length", [40, 64, 128])
def test_batched_prefill_gives_nearly_each_prompts_logits(on_device, length):
    """They are padded on the right; the tokens after them have nearly the same logits too."""
    prompts = (PROMPT, PROMPT[:10], PROMPT[5:38])
    rows = tuple(Row(7, len(prompt)) for prompt in prompts)
    alone = [_prefill(on_device, slot, prompt).whole for slot, prompt in enumerate(prompts)]
    following = [row.whole for row in on_device.run(StepPlan(rows=rows)).rows.logits]
    for slot in range(3):
        _prefill(on_device, slot, PROMPT[::-1])
    outcome = on_device.run(
        StepPlan(rows=rows, batches=(PromptBatch(0, prompts, length, (1.0,) * len(prompts)),))
    )

    assert outcome.batches[0].error is None
    assert np.allclose(alone, [row.whole for row in outcome.batches[0].logits], atol=0.05)
    assert np.allclose(following, [row.whole for row in outcome.rows.logits], atol=0.05)


def test_prompt_logits_are_nearly_those_of_shorter_prompts(on_device):
    """All of a chunk's logits are copied to the host, and the last ones are sampled there."""
    chunk = Chunk(0, 0, PROMPT, True, wants_all_logits=True)
    [result] = on_device.run(StepPlan(chunks=(chunk,))).chunks

    assert (len(PROMPT), on_device._model.vocab_size) == result.all_logits.shape
    assert result.all_logits[-1].tolist() == result.logits[0].tolist()
    for length in (2, 17, len(PROMPT)):
        expected = _prefill(on_device, 1, PROMPT[:length]).whole
        np.testing.assert_allclose(
            result.all_logits[length - 1], expected, rtol=0, atol=0.02 * np.abs(expected).max()
        )


def test_slots_can_be_moved_on_the_device(on_device):
    """A prompt that was copied and swapped continues as it would have."""
    _prefill(on_device, 0)
    _prefill(on_device, 1, PROMPT[::-1])
    first = on_device.run(StepPlan(rows=(Row(7, 40), Row(7, 40)))).rows.logits
    expected = [row.whole.copy() for row in first]
    _prefill(on_device, 0)
    _prefill(on_device, 1, PROMPT[::-1])
    moves = (Copy(0, 2, 40), Swap(0, 1, 40))
    second = on_device.run(StepPlan(moves, rows=tuple(Row(7, 40) for _ in range(3)))).rows.logits
    given = [row.whole for row in second]

    for index, place in enumerate((1, 0, 0)):
        assert np.allclose(expected[place], given[index], atol=0.05)


def test_replayed_graphs_give_nearly_the_logits_of_eager_runs(on_device, capturing, caplog):
    """For one to four rows, with other sizes and prompts in between; no graph is disabled."""
    for step, count in enumerate((1, 4, 4, 2, 4, 2, 1)):
        found = []
        for runner in (on_device, capturing):
            for slot in range(count):
                _prefill(runner, slot, PROMPT[: 10 * (slot + 1)])
            rows = tuple(Row(7 + step, 10 * (slot + 1)) for slot in range(count))
            found.append([row.whole for row in runner.run(StepPlan(rows=rows)).rows.logits])

        assert np.allclose(*found, atol=0.05)
    assert [] == caplog.messages


def test_float32_is_served_without_graphs(model, capturing, caplog):
    """This is decided before the session is created: nothing fails, and nothing is logged."""
    expected = () if model.precision == "fp32" else (1, 2, 4)

    assert expected == capturing.info.capture_sizes
    assert [] == caplog.messages


def test_the_engine_serves_from_the_device(either):
    """Greedy and sampled requests are complete; bookkeeping is consistent after every step."""
    sizes = either.info.capture_sizes
    harness = Harness(slots=4, slot_length=128, runner=either, batch_sizes=sizes)
    samplings = [
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=5),
    ]
    groups = [
        harness.submit(
            list(PROMPT[: 9 + i]), 15, sampling=sampling, n=2, stop_token_ids=frozenset()
        )
        for i, sampling in enumerate(samplings)
    ]
    harness.finish()

    assert {} == harness.errors
    assert [[15, 15]] * 3 == [[len(harness.tokens[group][i]) for i in (0, 1)] for group in groups]


def test_no_kernel_falls_back(model, caplog):
    """Symmetric weights load and run with the kernels made for them, at the first try."""
    _loaded(model, cuda_graphs=False)

    assert [] == [record.message for record in caplog.records if record.levelname == "WARNING"]
