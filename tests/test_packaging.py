"""What pyproject.toml declares is what the code needs."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES: list[str] = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
INSTALLED = importlib.metadata.packages_distributions()
EXPORT = "generator_svc/export/"
# Both distributions put modules into the namespace `google`.
GOOGLE = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}


def declared(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, its functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def distributions(module: str) -> set[str]:
    """The distributions that a module may come from; none for Python's own and ours."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or top in PACKAGES:
        return set()
    if top == "google":
        return {GOOGLE[".".join(module.split(".")[:2])]}
    return {canonicalize_name(name) for name in INSTALLED.get(top, [top])}


def undeclared(paths: Iterator[Path], requirements: set[str]) -> set[str]:
    """Imports for which no requirement is declared, as `file: module`."""
    return {
        f"{path.relative_to(ROOT)}: {module}"
        for path in paths
        for module in imported(path)
        for found in [distributions(module)]
        if found and not found & requirements
    }


def sources(exporter: bool) -> Iterator[Path]:
    """The files of the exporter, or of all else that is installed."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.relative_to(ROOT).as_posix().startswith(EXPORT) is exporter:
                yield path


def test_serving_declares_every_library_that_it_imports() -> None:
    """No library is there only because another one brings it along."""
    assert set() == undeclared(sources(exporter=False), declared(PROJECT["dependencies"]))


def test_the_export_extra_declares_every_library_that_it_imports() -> None:
    """The same for what only `trivium export` imports."""
    extra = PROJECT["optional-dependencies"]["export"]

    assert set() == undeclared(sources(exporter=True), declared([*PROJECT["dependencies"], *extra]))


def test_packages_are_marked_as_typed() -> None:
    """Type checkers read the annotations of what is installed."""
    assert [] == [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()]


def test_the_makefile_accepts_the_pythons_that_are_declared() -> None:
    """The classifiers name each minor version that `make` looks for."""
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    sought = re.findall(r"python(3\.\d+)", (ROOT / "Makefile").read_text().split("python3;")[0])

    assert sorted(classified) == sorted(sought)
