"""The generator as a process: how it starts or refuses to, serves and ends."""

import asyncio
import shutil
import signal
import socket
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2

from generator_svc.cuda import device_count
from tests.generator_svc.generator_process import non_log_lines, refusal, running, spawn
from tests.generator_svc.generator_stage import until_load
from tests.ports import free_port
from tests.tiny_models import tiny_model_directory
from trivium.generator.v1 import generator_pb2 as pb
from trivium.model_directory import MANIFEST, load_model_directory
from trivium.sampling.v1.sampling_pb2 import SamplingParams
from trivium.wire.errors import from_rpc_error

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def model():
    return load_model_directory(tiny_model_directory())


async def _call(generator, model, **fields):
    call = generator.stub.Generate()
    start = pb.StartGeneration(revision=model.revision, prompt_token_ids=[5, 6, 7], **fields)
    await call.write(pb.GenerateRequest(start=start))
    await call.done_writing()
    return call


async def test_wrong_settings_are_all_listed_at_once():
    """By the names of their variables, and the exit status is 2."""
    status, stderr = await refusal(port="99999", device="tpu", slots="0", threads="many")

    assert 2 == status
    named = [line.split(":")[0] for line in non_log_lines(stderr)]
    prefix = "TRIVIUM_GENERATOR_"
    wanted = {"DEVICE", "MODEL_DIRECTORY", "PORT", "SLOTS", "THREADS"}
    assert sorted(prefix + name for name in wanted) == sorted(named)


def _missing(folder):
    shutil.rmtree(folder)


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _truncated(folder):
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])


def _truncated_without_manifest(folder):
    (folder / MANIFEST).unlink()
    _truncated(folder)


def _without_tokenizer(folder):
    (folder / MANIFEST).unlink()
    (folder / "tokenizer.json").unlink()


def _wrong_defaults(folder):
    (folder / MANIFEST).unlink()
    (folder / "generation_config.json").write_text('{"temperature": 7}')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_missing, "no such model folder"),
        (_empty, "empty"),
        (_truncated, "truncated"),
        (_truncated_without_manifest, "model.onnx"),
        (_without_tokenizer, "tokenizer.json is missing"),
        (_wrong_defaults, "temperature is 7"),
    ],
)
async def test_invalid_model_folder_is_refused_in_one_line(model, tmp_path, spoil, said):
    """It names the folder and what is wrong with it; the exit status is 2."""
    folder = tmp_path / "m"
    shutil.copytree(model.path, folder)
    spoil(folder)
    status, stderr = await refusal(model_directory=folder, device="cpu")

    assert 2 == status
    [line] = non_log_lines(stderr)
    assert str(folder) in line
    assert said in line


async def test_too_little_memory_is_refused_in_one_line(model):
    """It says what is needed and what is available."""
    status, stderr = await refusal(model_directory=model.path, device="cpu", kv_cache_bytes=1000)

    assert 2 == status
    [line] = non_log_lines(stderr)
    assert "1,000" in line
    assert "kv_cache_bytes" in line


async def test_cuda_without_a_device_is_refused(model):
    """Without a CUDA device the process refuses to start rather than run on the CPU."""
    if device_count():
        async with running(model_directory=model.path, device="cuda") as generator:
            info = await generator.stub.GetModelInfo(pb.GetModelInfoRequest())
        outcome = info.execution_provider
    else:
        status, stderr = await refusal(model_directory=model.path, device="cuda")
        [line] = non_log_lines(stderr)
        assert "cuda" in line
        outcome = status

    assert outcome in (2, "CUDAExecutionProvider")


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
async def test_a_taken_port_is_refused(model, setting):
    """The exit status is 2, and one line names the setting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, stderr = await refusal(model_directory=model.path, device="cpu", **{setting: port})

    assert 2 == status
    [line] = non_log_lines(stderr)
    assert line == f"TRIVIUM_GENERATOR_{setting.upper()}: 127.0.0.1:{port} is in use"


async def test_model_info_shows_what_is_loaded(model):
    """The limits from the settings, the model's revision, and what is really in use."""
    async with running(
        model_directory=model.path, device="cpu", slots=3, max_sequence_length=100, max_n=5
    ) as generator:
        info = await generator.stub.GetModelInfo(pb.GetModelInfoRequest())
        load = await until_load(generator.stub)

    assert (model.id, model.revision) == (info.id, info.revision)
    assert (3, 96, 5) == (info.slots, info.context_length, info.max_n)
    assert info.instance_id
    assert ("CPUExecutionProvider", "float32", "fp32") == (
        info.execution_provider,
        info.dtype,
        info.precision,
    )
    assert model.vocab_size == info.vocabulary_size
    assert list(model.eos_token_ids) == list(info.eos_token_ids)
    assert pb.WatchLoadResponse(free_slots=3) == load


async def test_load_is_reported_on_change_and_regularly(model):
    """At once, on every change, regularly without changes, and until the drain."""
    async with running(
        model_directory=model.path, device="cpu", slots=4, drain_notice_seconds=0
    ) as generator:
        watch = generator.stub.WatchLoad(pb.WatchLoadRequest(min_interval_milliseconds=10))
        reports = aiter(watch)
        seen = [await anext(reports)]
        call = await _call(generator, model, max_new_tokens=1500, n=6, ignore_eos=True)
        while seen[-1].running_sequences < 4:
            seen.append(await anext(reports))
        busy = seen[-1]
        call.cancel()
        while seen[-1] != seen[0]:
            seen.append(await anext(reports))
        unchanged = await anext(reports)
        generator.terminate()
        late = [report async for report in reports]
        code = await watch.code()
        status, _ = await generator.ended()

    free = pb.WatchLoadResponse(free_slots=4)
    assert free == seen[0] == unchanged
    assert pb.WatchLoadResponse(running_sequences=4, waiting_sequences=2) == busy
    assert all(free == report for report in late)
    assert (grpc.StatusCode.OK, 0) == (code, status)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_drain(model, number):
    """NOT_SERVING at once, a running stream finishes, then the exit status is 0."""
    async with running(
        model_directory=model.path, device="cpu", drain_notice_seconds=1.0
    ) as generator:
        fields = {"max_new_tokens": 1500, "ignore_eos": True, "sampling": SamplingParams(seed=1)}
        messages = aiter(await _call(generator, model, **fields))
        first = await anext(messages)
        generator.process.send_signal(number)
        await generator.until_health(NOT_SERVING)
        updates = list(first.updates) + [u async for m in messages for u in m.updates]
        status, stderr = await generator.ended()

    assert 1500 == sum(len(update.token_ids) for update in updates)
    assert 1500 == updates[-1].finished.completion_tokens
    assert 0 == status
    assert [] == non_log_lines(stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_stop_signal_ends_the_loading(model, number):
    """Cleanly; for process 1 of a container, a signal without a handler would be lost."""
    process = await spawn(model_directory=model.path, port=0, metrics_port=0, threads=1)
    async with asyncio.timeout(60):
        while b"threads per run" not in await process.stderr.readline():
            assert process.returncode is None
        process.send_signal(number)
        _, stderr = await process.communicate()

    assert (0, False) == (process.returncode, b"Traceback" in stderr)


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_stop_signal_ends_the_warm_up(model):
    """A process that has loaded but is not ready exits cleanly too."""
    settings = {"port": 0, "metrics_port": 0, "threads": 1, "drain_notice_seconds": 0}
    process = await spawn(model_directory=model.path, **settings)
    async with asyncio.timeout(60):
        while b"threads per run" not in await process.stderr.readline():
            assert process.returncode is None
        while not _children(process.pid):  # the sandbox: once it has started, the event loop runs
            assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        _, stderr = await process.communicate()

    assert 0 == process.returncode
    assert [] == non_log_lines(stderr.decode())


async def test_stream_longer_than_the_drain_is_aborted(model):
    """The call gets the reason, and the process exits with status 0."""
    async with running(
        model_directory=model.path, device="cpu", drain_notice_seconds=0, drain_seconds=0.1
    ) as generator:
        call = await _call(generator, model, max_new_tokens=2040, n=64, ignore_eos=True)
        await anext(aiter(call))
        generator.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        status, _ = await generator.ended()

    assert grpc.StatusCode.UNAVAILABLE is caught.value.code()
    assert "draining" == from_rpc_error(caught.value).code
    assert 0 == status


async def test_metrics_are_served(model):
    """After cancelled and complete calls nothing is held, and device time adds up."""
    metrics_port = free_port()
    async with running(
        model_directory=model.path, device="cpu", metrics_port=metrics_port, slots=4
    ) as generator:
        calls = [await _call(generator, model, max_new_tokens=40, n=2) for _ in range(6)]
        for call in calls[:3]:
            call.cancel()
        for call in calls[3:]:
            assert [message async for message in call]
        free = pb.WatchLoadResponse(free_slots=4)
        await until_load(generator.stub, lambda load: load == free)
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://127.0.0.1:{metrics_port}/metrics")).text

    samples = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    label = f'{{model_name="{model.id}"}}'
    values = {name.replace(label, ""): float(value) for name, value in samples}
    name = "trivium_device_{}_nanoseconds_total"
    parts = [
        sum(value for key, value in values.items() if key.startswith(name.format(part)))
        for part in ("busy", "request", "overhead")
    ]
    assert parts[0] == parts[1] + parts[2] > 0
    assert 0 == values["vllm:num_requests_running"] == values["trivium_slots_in_use"]
    assert values["trivium_engine_generation_tokens_total"] > 0
