"""A release's artifacts, built and used: the sdist, the wheel and the bill of materials."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.images import instructions
from tests.ports import free_ports
from tests.test_packaging import LOCK, PACKAGES, PROJECT, ROOT
from tests.tiny_models import tiny_model_directory

VERSION = PROJECT["version"]
PORTS = ("port", "tokenizer-port", "tokenizer-metrics-port")
GENERATOR_PORTS = ("generator-port", "generator-metrics-port")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist sbom` builds."""
    folder = tmp_path_factory.mktemp("dist")
    environment = Path(sys.prefix)
    command = ["make", "--no-print-directory", "dist", "sbom"]
    options = [f"VENV={environment}", "-o", f"{environment}/.dev", f"DIST={folder}"]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    return folder


def packaged() -> set[str]:
    """The files of the packages in this checkout."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def in_wheel(wheel: Path) -> set[str]:
    """The files in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_packages(dist: Path) -> None:
    """It includes graphs, pages and type markers, and nothing else but metadata."""
    (wheel,) = dist.glob("*.whl")
    names = in_wheel(wheel)

    assert f"trivium-{VERSION}-py3-none-any.whl" == wheel.name
    assert packaged() == names
    assert {".onnx", ".html", ".typed", ".pyi", ".txt"} <= {Path(name).suffix for name in names}


def test_the_sdist_has_what_a_packager_needs(dist: Path) -> None:
    """It has the sources with tests, protocol, docs, lock and license."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    wanted = {"LICENSE", "Makefile", "requirements.lock", "protos/trivium/chat/v1/chat.proto"}
    assert set() == (wanted | packaged() | {"tests/test_release.py", "docs/errors.md"}) - names
    assert [] == [name for name in names if re.match(r"(models|dist|\.venv|\.git/)", name)]


def test_the_images_build_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    """What the Dockerfile copies is enough for `pip install .`, and gives the same files."""
    copies = [line.split()[1:-1] for line in instructions("build") if line.startswith("COPY ")]
    context = tmp_path / "src"
    context.mkdir()
    for source in (name for names in copies for name in names):
        (context / source).symlink_to(ROOT / source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "wheel"]
    subprocess.run([*command, str(context)], cwd=tmp_path, check=True)
    (built,) = (tmp_path / "wheel").iterdir()

    (released,) = dist.glob("*.whl")
    assert in_wheel(released) == in_wheel(built)


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a clean environment with the wheel.

    The libraries are this environment's, without what makes this checkout importable.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    options = ["install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, *options, str(wheel)], check=True, env=clean())
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def clean() -> dict[str, str]:
    """This environment without PYTHONPATH."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_wheel_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    """All four packages come from the clean environment, and the command prints its version."""
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{p}.__file__' for p in PACKAGES)})"
    python = subprocess.check_output(
        [installed / "python", "-c", code], cwd=tmp_path, env=clean(), text=True
    )
    version = subprocess.check_output(
        [installed / "trivium", "--version"], cwd=tmp_path, env=clean(), text=True
    )

    assert len(PACKAGES) == python.count(str(installed.parent))
    assert f"trivium {VERSION}\n" == version


@pytest.fixture
def url(installed: Path, tmp_path: Path) -> Iterator[str]:
    """The URL at which `trivium up` in the clean environment serves a tiny model."""
    ports = dict(zip((*PORTS, *GENERATOR_PORTS), free_ports(5), strict=True))
    command = [installed / "trivium", "up", "--model", str(tiny_model_directory())]
    command += [f"--{name}={port}" for name, port in ports.items()]
    small = {"TRIVIUM_GENERATOR_SLOTS": "4", "TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH": "512"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**clean(), **small}
    ) as process:
        assert process.stdout is not None
        ready = any("Trivium is ready" in line for line in process.stdout)
        assert ready, f"ended with {process.wait()} before it was ready"
        yield f"http://127.0.0.1:{ports['port']}"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert 0 == process.returncode


def test_the_wheel_serves(url: str) -> None:
    """A clean installation answers a request, serves its page and reports its version."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        health = client.get("/health").json()
        (model,) = client.get("/v1/models").json()["data"]
        body = {
            "model": model["id"],
            "messages": [{"role": "user", "content": "Hi"}],
            "max_completion_tokens": 4,
            "ignore_eos": True,
        }
        answer = client.post("/v1/chat/completions", json=body).json()
        page = client.get("/")

    assert {"status": "ok", "version": VERSION} == health
    assert 4 == answer["usage"]["completion_tokens"]
    assert (200, "text/html; charset=utf-8") == (page.status_code, page.headers["content-type"])


def test_the_sbom_matches_the_lock(dist: Path) -> None:
    """It has every pin in the lock with its hashes, and Trivium's name and version."""
    bill: dict[str, Any] = json.loads((dist / "trivium.cdx.json").read_text())
    pinned = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", LOCK, re.MULTILINE))
    about = bill["metadata"]["component"]
    hashes = [
        found["content"]
        for component in bill["components"]
        for reference in component["externalReferences"]
        for found in reference["hashes"]
    ]

    assert "CycloneDX" == bill["bomFormat"]
    assert ("trivium", VERSION) == (about["name"], about["version"])
    assert pinned == {one["name"]: one["version"] for one in bill["components"]}
    assert sorted(re.findall(r"sha256:([0-9a-f]{64})", LOCK)) == sorted(hashes)
