"""The import graph follows the architecture: heavy libraries in one place, services apart."""

import ast
import functools
import graphlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICES = ("rest_facade", "tokenizer_svc", "generator_svc")
PACKAGES = ("trivium", *SERVICES)
GENERATED = ("trivium/chat", "trivium/tokenizer", "trivium/generator", "trivium/sampling")

# Where each module may be imported, as path prefixes.
ALLOWED_IMPORTERS = {
    "onnxruntime": (
        "generator_svc/device.py",
        "generator_svc/export/",
        "trivium/cli/providers.py",
    ),
    "llguidance": ("generator_svc/constraint/llguidance.py",),
    "tokenizers": ("tokenizer_svc/tokenizer.py", "generator_svc/export/"),
    "jinja2": ("tokenizer_svc/prompt/chat_template.py", "generator_svc/export/"),
    "opentelemetry": ("trivium/wire/otlp.py",),
    "aiodns": ("trivium/wire/replicas/resolver.py",),
    "fastapi": ("rest_facade/",),
    "redis": ("trivium/keys/shared_accounts.py",),
    "starlette": ("rest_facade/",),
    "uvicorn": ("rest_facade/",),
    "typer": ("trivium/cli/", "generator_svc/export/__main__.py"),
    "rich": (
        "trivium/cli/",
        "generator_svc/export/progress_bar.py",
        "generator_svc/export/__main__.py",
    ),
    "torch": ("generator_svc/export/",),
    "transformers": ("generator_svc/export/",),
    "optimum": ("generator_svc/export/",),
    "onnx": ("generator_svc/export/", "generator_svc/graphs/build.py"),
    "onnx_ir": ("generator_svc/export/",),
    "gguf": ("generator_svc/export/",),
    "safetensors": ("generator_svc/export/",),
    "huggingface_hub": ("generator_svc/export/checkpoint/hub.py",),
    "requests": ("generator_svc/export/checkpoint/hub.py",),
}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "base", "core", "manager"}
STANDARD_LIBRARY_ONLY = (
    "generator_svc/sequence.py",
    "generator_svc/scheduler.py",
    "generator_svc/prefill_cost.py",
    "generator_svc/prefill_planner.py",
    "generator_svc/prompt_batches.py",
    "generator_svc/kv_cache.py",
    "tokenizer_svc/output/stop.py",
    "trivium/cache_folder.py",
    "trivium/cuda_libraries.py",
    "trivium/embedded_model.py",
    "trivium/export_extra.py",
    "trivium/file_digest.py",
    "trivium/host_limits.py",
    "trivium/limits.py",
    "trivium/model_directory.py",
)
EDGES = ("service", "convert", "server", "__main__")
# The tokenizer's folders and modules, by stage; each may import only earlier ones. Modules in the
# package itself that are not listed here put them together.
TOKENIZER_STAGES = (
    "tokenizer",
    "families",
    "request",
    "prompt",
    "generator",
    "constraint",
    "output",
    "convert",
)
# Passed through from the caller to the sampler unchanged, so the tokenizer's own types contain it.
PASSED_THROUGH = "trivium.sampling.v1.sampling_pb2."


def sources() -> list[Path]:
    """Every module that is not generated."""
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [path for path in found if not relative(path).startswith(GENERATED)]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Full names of a module's imports, those inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", ALLOWED_IMPORTERS)
def test_heavy_libraries_are_imported_in_one_place(name: str) -> None:
    """A heavy library is imported only in its own place."""
    strangers = [
        relative(path)
        for path in sources()
        if not relative(path).startswith(ALLOWED_IMPORTERS[name])
        and any(imported.split(".")[0] == name for imported in imports(path))
    ]

    assert [] == strangers


def test_protobuf_stays_at_the_edge() -> None:
    """Generated messages are imported only in service, server, convert… and __main__ modules,
    except the one that is passed through."""
    strangers = [
        relative(path)
        for path in sources()
        if relative(path).startswith(SERVICES)
        and any(
            "_pb2" in imported and not imported.startswith(PASSED_THROUGH)
            for imported in imports(path)
        )
        and not any(part.startswith(EDGES) for part in relative(path).split("/")[1:])
    ]

    assert [] == strangers


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_imports_another(service: str) -> None:
    """Services know each other only through their protocols."""
    others = set(SERVICES) - {service}
    strangers = [
        (relative(path), imported)
        for path in sources()
        if relative(path).startswith(f"{service}/")
        for imported in imports(path)
        if imported.split(".")[0] in others or imported.startswith("trivium.cli")
    ]

    assert [] == strangers


def test_shared_code_imports_no_service() -> None:
    """`trivium` imports no service; the CLI starts them as processes."""
    strangers = [
        (relative(path), imported)
        for path in sources()
        if relative(path).startswith("trivium/")
        for imported in imports(path)
        if imported.split(".")[0] in SERVICES
    ]

    assert [] == strangers


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_bookkeeping_needs_only_the_standard_library(module: str) -> None:
    """Decisions are made in plain Python, which can be read and tested without a runtime."""
    package = module.split("/")[0]
    libraries = {imported.split(".")[0] for imported in imports(ROOT / module)} - {package}

    assert set() == libraries - set(sys.stdlib_module_names)


def test_no_import_cycles() -> None:
    """There is an order of modules in which each imports only earlier ones."""
    assert list(graphlib.TopologicalSorter(import_graph()).static_order())


@pytest.mark.parametrize(
    "package", sorted({module_name(path.parent / "__init__.py") for path in sources()})
)
def test_no_import_cycles_between_folders(package: str) -> None:
    """The same for the folders and modules of each package, where a folder is one node."""

    def child(name: str) -> str | None:
        inside = name.removeprefix(f"{package}.")
        return None if inside == name else inside.split(".")[0]

    graph: dict[str | None, set[str | None]] = {}
    for name, imported in import_graph().items():
        graph.setdefault(child(name), set()).update(map(child, imported))
    between = {name: others - {name, None} for name, others in graph.items() if name is not None}

    assert list(graphlib.TopologicalSorter(between).static_order())


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    modules = {module_name(path): path for path in sources()}
    return {
        name: {found for found in map(modules_of(modules), imports(path)) if found}
        for name, path in modules.items()
    }


def test_tokenizer_folders_import_only_earlier_ones() -> None:
    """Its folders are in the order in which requests pass through; none imports a later one."""

    def stage(name: str) -> int:
        part = name.split(".")[1] if "." in name else ""
        known = part in TOKENIZER_STAGES
        return TOKENIZER_STAGES.index(part) if known else len(TOKENIZER_STAGES)

    strangers = [
        (relative(path), imported)
        for path in sources()
        if relative(path).startswith("tokenizer_svc/")
        for imported in imports(path)
        if imported.startswith("tokenizer_svc.") and stage(imported) > stage(module_name(path))
    ]

    assert [] == strangers


def modules_of(modules: dict[str, Path]) -> Callable[[str], str | None]:
    """Finds the module that an imported name is, or is part of."""

    def find(imported: str) -> str | None:
        if imported in modules:
            return imported
        parent = imported.rpartition(".")[0]
        return parent if parent in modules else None

    return find


def test_no_meaningless_module_names() -> None:
    """No module has a name that says nothing."""
    assert [] == [relative(path) for path in sources() if path.stem in FORBIDDEN_NAMES]


def test_every_module_has_a_docstring() -> None:
    """Each module that is not empty begins with a docstring."""
    trees = {relative(path): tree(path) for path in sources()}

    assert [] == [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
