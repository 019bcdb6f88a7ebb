"""What happens if a CUDA device is visible but cannot be used, simulated."""

import mmap
import subprocess
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from bench.random_llama import SHAPES as BENCH_SHAPES
from bench.random_llama import make_random_llama
from generator_svc import server, startup
from generator_svc.config import GeneratorSettings
from generator_svc.cuda import CudaError
from generator_svc.device import Device, DeviceError, choose_device, why_not_cuda
from generator_svc.metrics import register_info
from generator_svc.run.outcome import RunResult
from generator_svc.run.runner import OrtRunner
from tests.tiny_models import tiny_model_directory
from trivium.cuda_libraries import LIBRARIES, missing_libraries
from trivium.host_limits import MemoryLimit
from trivium.model_directory import ModelDirectory, load_model_directory


@pytest.fixture
def broken_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that shows a device, but no library to use it with."""

    def no_library() -> int:
        raise CudaError("no runtime library was found")

    monkeypatch.setattr(startup, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(startup, "device_count", lambda: 1)
    monkeypatch.setattr("generator_svc.memory_plan.device_memory", no_library)


def _settings(device: str, **fields: object) -> GeneratorSettings:
    folder = tiny_model_directory()
    return GeneratorSettings(model_directory=folder, device=device, slots=2, threads=1, **fields)


@pytest.mark.parametrize("cache_bytes", [0, 2**24])
@pytest.mark.usefixtures("broken_cuda")
def test_auto_falls_back_to_the_cpu(cache_bytes, monkeypatch, caplog):
    """If the device's memory cannot be queried or the session does not start; the log, GetModelInfo
    and metrics say so."""
    settings = _settings("auto", kv_cache_bytes=cache_bytes)
    if cache_bytes:

        def refuse_cuda(model, device, *rest):
            if device == "cuda":
                raise DeviceError("the CUDAExecutionProvider did not start")
            return OrtRunner(model, device, *rest)

        memory = MemoryLimit(2**34, 2**33, "the CUDA device")
        monkeypatch.setattr("generator_svc.memory_plan.device_memory", lambda: memory)
        monkeypatch.setattr(startup, "OrtRunner", refuse_cuda)
    model = load_model_directory(settings.model_directory)
    runner = startup.load_runner(settings, model)
    info, registry = server.describe(model, runner, settings), CollectorRegistry()
    register_info(registry, model.id, "", runner.info, True)
    reason = "did not start" if cache_bytes else "no runtime library was found"

    assert "CPUExecutionProvider" == info.execution_provider
    assert reason in info.cuda_unavailable
    assert reason in caplog.text
    assert reason in generate_latest(registry).decode()


def test_missing_libraries_are_named(monkeypatch):
    """All of them, with their packages and how to install them, when `cuda` is refused."""
    libraries = {"libnone.so.1": "nvidia-none", "libc.so.6": "libc", "libno.so.2": "nvidia-no"}
    monkeypatch.setattr("trivium.cuda_libraries.LIBRARIES", libraries)
    monkeypatch.setattr("generator_svc.device.device_count", lambda: 1)
    why_not_cuda.cache_clear()
    try:
        with pytest.raises(DeviceError) as refused:
            choose_device("cuda")
        chosen = choose_device("auto")
    finally:
        why_not_cuda.cache_clear()

    assert "libnone.so.1 (nvidia-none), libno.so.2 (nvidia-no); pip install" in str(refused.value)
    assert "libc" not in str(refused.value)
    assert "cpu" == chosen


def test_linux_library_names_are_only_checked_on_linux(monkeypatch):
    """On systems other than Linux, missing Linux libraries do not rule out CUDA."""
    monkeypatch.setattr("trivium.cuda_libraries.LIBRARIES", {"libnone.so.1": "nvidia-none"})
    monkeypatch.setattr("trivium.cuda_libraries.sys.platform", "win32")

    assert "" == missing_libraries()


def test_the_libraries_are_those_that_the_provider_is_linked_to():
    """A new version of ONNX Runtime may need others."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        pytest.skip("ONNX Runtime is built without CUDA")
    linked = subprocess.run(["ldd", provider], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in linked.splitlines()}

    assert {name for name in names if name.startswith(("libcu", "libnv"))} <= set(LIBRARIES)
    assert set(LIBRARIES) - names <= {"libcudnn.so.9"}  # which is loaded when first used


GIBIBYTE = 2**30


@pytest.mark.parametrize(
    ("loaded_gib", "fields", "slots"),
    [
        (1 + 2 / 0.9, {}, 256),
        (1 + 0.1, {}, 62),  # of 1.5 MiB
        (0.5, {}, 1),
        (9, {"slots": 5}, 5),
        (1 + 0.1, {"kv_memory_share": 0.45}, 31),
        (9, {"kv_cache_bytes": 30 * 2**20}, 20),
    ],
)
def test_slots_are_planned_after_a_model_run(loaded_gib, fields, slots, monkeypatch):
    """On CUDA, as what is free before says little about activations, contexts and weight copies.
    Room for CUDA graphs is reserved. Here the model runs on the CPU instead of the device."""
    frees = [10 * GIBIBYTE, int(loaded_gib * GIBIBYTE)]
    memory = lambda: MemoryLimit(10 * GIBIBYTE, frees.pop(0), "the CUDA device")  # noqa: E731
    monkeypatch.setattr("generator_svc.memory_plan.device_memory", memory)
    monkeypatch.setattr(startup, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(
        startup, "OrtRunner", lambda model, device, *rest: OrtRunner(model, "cpu", *rest)
    )
    settings = GeneratorSettings(
        model_directory=tiny_model_directory(), device="cuda", threads=1, **fields
    )
    model = load_model_directory(settings.model_directory)
    runner = startup.load_runner(settings, model)

    assert slots == runner.info.slots
    assert model.context_length == runner.info.slot_length
    assert [] == frees


def test_planning_run_is_as_large_as_any_later_run(monkeypatch):
    """It fills max_num_batched_tokens with prompts; their slots' memory is free afterwards."""
    free = GIBIBYTE + 15 * 2**19  # 7.5 MiB besides CUDA graphs
    memory = MemoryLimit(10 * GIBIBYTE, free, "the CUDA device")
    monkeypatch.setattr("generator_svc.memory_plan.device_memory", lambda: memory)
    monkeypatch.setattr(startup, "choose_device", lambda wanted: "cuda")
    ran = []

    class Watched(OrtRunner):
        def __init__(self, model, device, *rest):
            super().__init__(model, "cpu", *rest)

        def run(self, plan):
            ran.append(plan)
            return super().run(plan)

    monkeypatch.setattr(startup, "OrtRunner", Watched)
    settings = GeneratorSettings(
        model_directory=tiny_model_directory(),
        device="cuda",
        threads=1,
        max_sequence_length=512,
        kv_memory_share=0.5,
    )
    model = load_model_directory(settings.model_directory)
    runner = startup.load_runner(settings, model)
    slot_bytes = runner.info.cache_bytes // runner.info.slots
    (batch,) = ran[0].batches

    assert (4, 512) == (len(batch.prompts), batch.length)
    assert (15 * 2**19 + 4 * slot_bytes) // 2 // slot_bytes == runner.info.slots


@pytest.fixture
def symmetric_model(tmp_path: Path) -> ModelDirectory:
    return load_model_directory(
        make_random_llama(tmp_path / "model", BENCH_SHAPES["tiny"], "int4", "cuda")
    )


@pytest.mark.parametrize("fails", ["session", "run", "never"])
def test_quantised_matmuls_fall_back_to_the_default_kernels(
    fails, symmetric_model, monkeypatch, caplog
):
    """Symmetric weights use the kernels made for them, unless these fail to load or to run, which
    logs one warning. Here the model runs on the CPU instead of the device."""
    memory = MemoryLimit(10 * GIBIBYTE, 5 * GIBIBYTE, "the CUDA device")
    monkeypatch.setattr("generator_svc.memory_plan.device_memory", lambda: memory)
    monkeypatch.setattr(startup, "choose_device", lambda wanted: "cuda")
    asked = []

    class PickyRunner(OrtRunner):
        def __init__(self, model, device, *rest):
            asked.append(rest[-1])
            if rest[-1] and fails == "session":
                raise DeviceError("no such kernel")
            super().__init__(model, "cpu", *rest)

        def run(self, plan):
            outcome = super().run(plan)
            if asked[-1] and fails == "run":
                failed = RunResult(1, error=RuntimeError("No valid fpA_intB MatMulNBits tactic"))
                return replace(outcome, batches=(failed,))
            return outcome

    monkeypatch.setattr(startup, "OrtRunner", PickyRunner)
    path = symmetric_model.path
    settings = GeneratorSettings(model_directory=path, device="cuda", threads=1, slots=2)
    runner = startup.load_runner(settings, symmetric_model)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]

    assert 2 == runner.info.slots
    assert ([True] if fails == "never" else [True, False]) == asked
    assert (0 if fails == "never" else 1) == len(warnings)


def test_other_models_skip_kernel_timing(monkeypatch):
    """With zero points, or without quantised weights, there is nothing to gain."""
    memory = MemoryLimit(10 * GIBIBYTE, 5 * GIBIBYTE, "the CUDA device")
    monkeypatch.setattr("generator_svc.memory_plan.device_memory", lambda: memory)
    monkeypatch.setattr(startup, "choose_device", lambda wanted: "cuda")
    asked = []

    def load(model, device, *rest):
        asked.append(rest[-1])
        return OrtRunner(model, "cpu", *rest)

    monkeypatch.setattr(startup, "OrtRunner", load)
    folder = tiny_model_directory("llama", "int4")
    settings = GeneratorSettings(model_directory=folder, device="cuda", threads=1, slots=2)
    startup.load_runner(settings, load_model_directory(folder))

    assert [False] == asked


@pytest.mark.parametrize("weight_only_gemm", [True, False])
def test_kernels_are_chosen_by_session_options(weight_only_gemm, symmetric_model, monkeypatch):
    """By ONNX Runtime's own option names, which the library of its CUDA provider contains."""
    given = {}

    class Session:
        def __init__(self, graph, options, providers):
            for name in ("ep.cuda.fpa_intb_gemm", "ep.cuda.fpa_intb_profile_m"):
                try:
                    given[name] = options.get_session_config_entry(name)
                except RuntimeError:  # it has not been set
                    given[name] = None

        def get_providers(self):
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr("generator_svc.device.ort.InferenceSession", Session)
    Device("cuda").open(symmetric_model.graph, weight_only_gemm=weight_only_gemm)
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"

    assert ("1" if weight_only_gemm else None) == given["ep.cuda.fpa_intb_gemm"]
    assert weight_only_gemm == (given["ep.cuda.fpa_intb_profile_m"] is not None)
    if provider.exists():
        with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            assert all(text.find(name.encode()) > 0 for name in given)


@pytest.mark.usefixtures("broken_cuda")
def test_requested_cuda_does_not_fall_back():
    """The generator refuses to start rather than being slow unnoticed."""
    settings = _settings("cuda")
    with pytest.raises(CudaError):
        startup.load_runner(settings, load_model_directory(settings.model_directory))
