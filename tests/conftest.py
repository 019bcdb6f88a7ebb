"""Which tests run: those marked gpu if there is a CUDA device, only quick ones with --fast."""

import ast
import functools
import importlib.util
import logging
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from generator_svc.cuda import device_count
from tests.ports import free_port

# Examples may be slow on a busy machine; that is not a failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Under nohup, the services that tests start would inherit that SIGHUP is ignored.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

HERE = Path(__file__).parent
# Needed only by the exporter. With --fast it cannot be imported, and test files are left out that
# import it, or the exporter, even through another module of tests/ or a conftest.py;
HIDDEN = ("torch", "transformers", "optimum", "onnx", "gguf", "tests.tiny_models")
EXPORTER = (*HIDDEN, "generator_svc.export")
# so are those that start servers or other programs, or depend on timing,
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
    "test_stop_signals.py",
    "test_tracing.py",
    "tokenizer_svc/test_generator_loss.py",
    "tokenizer_svc/test_generator_refusal.py",
    "tokenizer_svc/test_tokenizer_stage.py",
)
# and exhaustive ones.
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
    """An unused port; pytest-asyncio's own fixture may return one that another test is given."""
    return free_port()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests spend half of their time waiting."""
    return (os.cpu_count() or 1) + 1


def _is_of_this_test(record: logging.LogRecord) -> bool:
    """False for errors that gRPC's shared poller logs for the event loop of an earlier test."""
    return "PollerCompletionQueue._handle_events" not in record.getMessage()


def pytest_configure(config: pytest.Config) -> None:
    """Fast tests try few examples, and cannot import what only the exporter needs."""
    logging.getLogger("asyncio").addFilter(_is_of_this_test)
    if config.getoption("--fast"):
        if gone := [str(path) for path in LEFT_OUT if not path.exists()]:
            raise pytest.UsageError(f"tests/conftest.py lists files that do not exist: {gone}")
        settings.register_profile("fast", max_examples=20)
        settings.load_profile("fast")
        sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("--fast"):
        return None
    is_left_out = collection_path in LEFT_OUT or _needs_the_exporter(collection_path)
    return True if is_left_out else None  # other hooks may decide differently


def _needs_the_exporter(path: Path) -> bool:
    """Whether a test file, or a folder's conftest.py, imports what only the exporter needs."""
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
    """The modules that a file imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped if there is none."""
    on_device = [item for item in items if item.get_closest_marker("gpu")]
    if on_device and not device_count():
        for item in on_device:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
