"""Which tests run: those marked gpu where there is a CUDA device, quick ones alone with --fast."""

import ast
import functools
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from generator_svc.cuda import device_count
from tests.ports import free_port

# A busy machine makes an example slow, and a slow example is no fault.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

HERE = Path(__file__).parent
# What only the exporter needs. With --fast it cannot be imported, and test files that import it, or
# the exporter, are left out, be it by way of another module of tests/ or of their conftest.py;
HIDDEN = ("torch", "transformers", "optimum", "onnx", "gguf", "tests.tiny_models")
EXPORTER = (*HIDDEN, "generator_svc.export")
# so are those that start servers or other programs, or look at the clock,
START_PROGRAMS = (
    "bench/test_gpu_bench.py",
    "bench/test_replicas_bench.py",
    "cli/test_cli_fit.py",
    "clients",
    "examples",
    "generator_svc/test_constrained_service.py",
    "generator_svc/test_cuda.py",
    "generator_svc/test_generator_memory.py",
    "kubernetes",
    "rest_facade/test_chat_page.py",
    "rest_facade/test_edge.py",
    "rest_facade/test_facade_errors.py",
    "rest_facade/test_facade_process.py",
    "rest_facade/test_facade_schemathesis.py",
    "rest_facade/test_facade_shared_limits.py",
    "rest_facade/test_facade_tls.py",
    "rollout",
    "templates",
    "test_outages.py",
    "test_tracing.py",
    "tokenizer_svc/test_generator_loss.py",
    "tokenizer_svc/test_generator_refusal.py",
    "tokenizer_svc/test_tokenizer_stage.py",
)
# and those that try everything out.
EXHAUSTIVE = (
    "generator_svc/test_cuda_answers.py",
    "generator_svc/test_patterns.py",
    "generator_svc/test_schema_relaxation.py",
    "tokenizer_svc/test_cut_answers.py",
    "tokenizer_svc/test_families.py",
    "tokenizer_svc/test_merged_tokens.py",
)
LEFT_OUT = {HERE / path for path in (*START_PROGRAMS, *EXHAUSTIVE)}


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


@pytest.fixture
def unused_tcp_port() -> int:
    """A port at which nobody will listen; pytest-asyncio's own may be given to another test."""
    return free_port()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: half of the time of many tests is waiting."""
    return (os.cpu_count() or 1) + 1


def _is_of_this_test(record: logging.LogRecord) -> bool:
    """False for what gRPC's poller, one for all event loops, reports of an earlier test's loop."""
    return "PollerCompletionQueue._handle_events" not in record.getMessage()


def pytest_configure(config: pytest.Config) -> None:
    """Fast tests try a few examples, and cannot import what only the exporter needs."""
    logging.getLogger("asyncio").addFilter(_is_of_this_test)
    if config.getoption("--fast"):
        if gone := [str(path) for path in LEFT_OUT if not path.exists()]:
            raise pytest.UsageError(f"tests/conftest.py leaves out what is gone: {gone}")
        settings.register_profile("fast", max_examples=20)
        settings.load_profile("fast")
        sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("--fast"):
        return None
    is_left_out = collection_path in LEFT_OUT or _needs_the_exporter(collection_path)
    return True if is_left_out else None  # others may have reasons of their own


def _needs_the_exporter(path: Path) -> bool:
    """Whether a test file, or the conftest.py of a folder, imports what only the exporter needs."""
    seen: set[Path] = set()
    to_look_at = [path / "conftest.py" if path.is_dir() else path]
    while to_look_at:
        file = to_look_at.pop()
        if file in seen or file.suffix != ".py" or not file.exists():
            continue
        seen.add(file)
        for module in _imported(file):
            if any(f"{module}.".startswith(f"{name}.") for name in EXPORTER):
                return True
            if module.startswith("tests."):
                to_look_at.append(HERE.parent / f"{module.replace('.', '/')}.py")
    return False


@functools.cache
def _imported(file: Path) -> set[str]:
    """The modules that a file imports, at its top or anywhere else."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped where there is none."""
    on_device = [item for item in items if item.get_closest_marker("gpu")]
    if on_device and not device_count():
        for item in on_device:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
