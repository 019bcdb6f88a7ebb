"""What happens where a CUDA device shows and cannot be used, made to happen on command."""

import pytest

import generator_svc.server as generator
from generator_svc.config import GeneratorSettings
from generator_svc.cuda import CudaError
from generator_svc.device import DeviceError
from generator_svc.run.runner import OrtRunner
from tests.tiny_models import tiny_model_directory
from trivium.model_directory import load_model_directory


@pytest.fixture
def broken_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that shows a device, and no library to use it with."""

    def no_library() -> int:
        raise CudaError("no runtime library was found")

    monkeypatch.setattr(generator, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr("generator_svc.memory_plan.device_memory", no_library)


def _settings(device: str, **fields: object) -> GeneratorSettings:
    folder = tiny_model_directory()
    return GeneratorSettings(model_directory=folder, device=device, slots=2, threads=1, **fields)


@pytest.mark.parametrize("cache_bytes", [0, 2**24])
@pytest.mark.usefixtures("broken_cuda")
def test_auto_goes_on_with_the_cpu(cache_bytes, monkeypatch):
    """Whether its memory cannot be asked for or its session does not start."""
    settings = _settings("auto", kv_cache_bytes=cache_bytes)
    if cache_bytes:

        def refuse_cuda(model, device, *rest):
            if device == "cuda":
                raise DeviceError("the CUDAExecutionProvider did not start")
            return OrtRunner(model, device, *rest)

        monkeypatch.setattr(generator, "OrtRunner", refuse_cuda)
    runner = generator.load_runner(settings, load_model_directory(settings.model_directory))

    assert "CPUExecutionProvider" == runner.info.provider


@pytest.mark.usefixtures("broken_cuda")
def test_cuda_that_was_asked_for_is_not_replaced():
    """It refuses to start rather than being slow unnoticed."""
    settings = _settings("cuda")
    with pytest.raises(CudaError):
        generator.load_runner(settings, load_model_directory(settings.model_directory))
