"""Which tests run: those marked gpu where there is a CUDA device, quick ones alone with --fast."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from generator_svc.cuda import device_count

# A busy machine makes an example slow, and a slow example is no fault.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

HERE = Path(__file__).parent
# What --fast leaves out: tests that need PyTorch and its kin, or a model that the exporter makes,
NEED_THE_EXPORTER = (
    "bench/test_gpu_bench.py",
    "bench/test_published_sizes.py",
    "bench/test_random_checkpoint.py",
    "bench/test_random_llama.py",
    "bench/test_replicas_bench.py",
    "cli/test_cli_export.py",
    "generator_svc/export",
    "generator_svc/test_device_sampler.py",
    "generator_svc/test_cuda.py",
    "generator_svc/test_cuda_experts.py",
    "generator_svc/test_fixed_inputs.py",
    "generator_svc/test_generator_device.py",
    "generator_svc/test_graphs.py",
    "generator_svc/test_generator_limits.py",
    "generator_svc/test_generator_memory.py",
    "generator_svc/test_generator_process.py",
    "generator_svc/test_generator_runner.py",
    "pipeline",
    "rollout",
    "test_model_directory.py",
    "test_release.py",
    "tokenizer_svc/test_prompt.py",
    "tokenizer_svc/test_prompt_tools.py",
)
# those that start servers or other programs, or look at the clock, which do not run in parallel,
START_PROGRAMS = (
    "cli/test_cli_fit.py",
    "cli/test_cli_up_real.py",
    "cli/test_cli_up_replicas.py",
    "clients",
    "examples",
    "generator_svc/test_constrained_service.py",
    "kubernetes",
    "rest_facade/test_chat_page.py",
    "rest_facade/test_edge.py",
    "rest_facade/test_facade_errors.py",
    "rest_facade/test_facade_process.py",
    "rest_facade/test_facade_schemathesis.py",
    "rest_facade/test_facade_shared_limits.py",
    "templates",
    "test_tracing.py",
    "tokenizer_svc/test_generator_loss.py",
    "tokenizer_svc/test_generator_refusal.py",
    "tokenizer_svc/test_tokenizer_stage.py",
)
# and those that try everything out.
EXHAUSTIVE = (
    "generator_svc/test_patterns.py",
    "generator_svc/test_schema_relaxation.py",
    "tokenizer_svc/test_cut_answers.py",
    "tokenizer_svc/test_families.py",
    "tokenizer_svc/test_merged_tokens.py",
)
LEFT_OUT = {HERE / path for path in (*NEED_THE_EXPORTER, *START_PROGRAMS, *EXHAUSTIVE)}
HIDDEN = ("torch", "transformers", "optimum", "onnx", "gguf", "tests.tiny_models")


@pytest.fixture(scope="session")
def generate() -> ModuleType:
    """docs/generate.py as a module."""
    path = HERE.parent / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="leave out what needs PyTorch or a model, starts programs or takes long",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Fast tests try a few examples, and cannot import what only the exporter needs."""
    if config.getoption("--fast"):
        if gone := [str(path) for path in LEFT_OUT if not path.exists()]:
            raise pytest.UsageError(f"tests/conftest.py leaves out what is gone: {gone}")
        settings.register_profile("fast", max_examples=20)
        settings.load_profile("fast")
        sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--fast") and collection_path in LEFT_OUT else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped where there is none."""
    on_device = [item for item in items if item.get_closest_marker("gpu")]
    if on_device and not device_count():
        for item in on_device:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
