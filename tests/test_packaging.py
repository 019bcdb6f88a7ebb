"""pyproject.toml declares exactly what the code needs."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.images import instructions, last

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES: list[str] = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
INSTALLED = importlib.metadata.packages_distributions()
LOCK = (ROOT / "requirements.lock").read_text()
# The lock is for the Dockerfile's Python.
_PYTHON = re.findall(r"python:(\d+\.\d+)", (ROOT / "Dockerfile").read_text())[0]
IMAGE = {
    "extra": "",
    "platform_system": "Linux",
    "python_full_version": f"{_PYTHON}.0",
    "python_version": _PYTHON,
    "sys_platform": "linux",
}
# What needs an extra: the exporter, the code that builds the shipped graphs, and modules that are
# imported only if a setting requires them.
EXTRAS = {
    "export": ("generator_svc/export/", "generator_svc/graphs/build.py"),
    "otel": ("trivium/wire/otlp.py",),
    "redis": ("trivium/keys/shared_accounts.py",),
}
# Both distributions have modules in the namespace `google`.
GOOGLE = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}


def declared(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def distributions(module: str) -> set[str]:
    """The distributions that a module may come from; none for the standard library and ours."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or top in PACKAGES:
        return set()
    if top == "google":
        return {GOOGLE[".".join(module.split(".")[:2])]}
    return {canonicalize_name(name) for name in INSTALLED.get(top, [top])}


def undeclared(paths: Iterator[Path], requirements: set[str]) -> set[str]:
    """Imports without a declared requirement, as `file: module`."""
    return {
        f"{path.relative_to(ROOT)}: {module}"
        for path in paths
        for module in imported(path)
        for found in [distributions(module)]
        if found and not found & requirements
    }


def sources(extra: str = "") -> Iterator[Path]:
    """The files that need an extra, or those that need none."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if extra == next((one for one, paths in EXTRAS.items() if name.startswith(paths)), ""):
                yield path


def test_serving_declares_every_library_that_it_imports() -> None:
    """No library is used just because another one depends on it."""
    assert set() == undeclared(sources(), declared(PROJECT["dependencies"]))


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_declares_every_library_that_it_imports(extra: str) -> None:
    """The same for imports of `trivium export`, traces and shared limits."""
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]

    assert set() == undeclared(sources(extra), declared(requirements))


def test_packages_are_marked_as_typed() -> None:
    """Type checkers read the installed annotations."""
    assert [] == [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()]


def test_the_makefile_accepts_the_declared_pythons() -> None:
    """The classifiers list each minor version that `make` looks for."""
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    sought = re.findall(r"python(3\.\d+)", (ROOT / "Makefile").read_text().split("python3;")[0])

    assert sorted(classified) == sorted(sought)


def pins(text: str) -> dict[str, str]:
    """Versions by name, from the lock's lines `name==version` that apply to Linux."""
    found = re.findall(r"^([a-z0-9.-]+)==(\S+)(?: ; (.+?))? \\$", text, re.MULTILINE)
    return {name: version for name, version, marker in found if on_the_images(marker)}


def on_the_images(marker: str | None) -> bool:
    """Whether a marker is true in the images, with the Dockerfile's Python on Linux."""
    return not marker or Marker(marker).evaluate(IMAGE)


def unmet(lines: list[str], locked: dict[str, str]) -> list[str]:
    """The requirements that apply to the images and are not satisfied by the lock."""
    wanted = [Requirement(line) for line in lines]
    return [
        str(requirement)
        for requirement in wanted
        if on_the_images(str(requirement.marker or ""))
        and not requirement.specifier.contains(
            locked.get(canonicalize_name(requirement.name), "0.dev0"), prereleases=True
        )
    ]


def test_the_lock_satisfies_what_is_declared() -> None:
    """Each dependency is pinned within its range, including those for traces and shared limits."""
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["otel"], *extras["redis"]]

    assert [] == unmet(wanted, pins(LOCK))


def test_the_lock_is_complete() -> None:
    """It has its packages' requirements, checked for those installed here in the same version."""
    locked = pins(LOCK)
    same = [name for name in locked if installed_version(name) == locked[name]]

    assert len(same) > len(locked) // 2
    assert {} == {
        name: missing
        for name in same
        if (missing := unmet(importlib.metadata.requires(name) or [], locked))
    }


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_every_pin_has_hashes_and_no_host() -> None:
    """Images get the same files from any index; pip refuses files without a hash."""
    pinned = re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE)[1:]

    assert len(pinned) >= len(PROJECT["dependencies"])
    assert [] == [entry for entry in pinned if "--hash=sha256:" not in entry]
    assert "://" not in LOCK


@pytest.mark.parametrize("target", ["rest_facade", "tokenizer_svc", "generator_svc", "export"])
def test_images_have_version_and_license_labels(target: str) -> None:
    """Their labels have the project's version and license."""
    labels = dict(pair.split("=", 1) for pair in last(target, "LABEL").split())

    assert {
        "title": PROJECT["name"],
        "version": PROJECT["version"],
        "licenses": PROJECT["license"],
    } == {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}


def test_the_images_install_the_lock() -> None:
    """They require hashes, and install nothing else but this project."""
    installs = [line for line in instructions("serving") + instructions("build") if "pip " in line]

    assert [
        "RUN /opt/trivium/bin/pip install --require-hashes -r requirements.lock",
        "RUN /opt/trivium/bin/pip install --no-deps .",
    ] == installs
