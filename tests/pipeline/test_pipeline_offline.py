"""Nothing phones home: no DNS queries, no outgoing connections, no stored id."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import tiny_checkpoint

ROOT = Path(__file__).parents[2]
OFFLINE = Path(__file__).with_name("offline.py")
# ONNX Runtime's first DNS query comes about nine seconds after it is loaded.
SECONDS = "15"

GENERATOR = "TRIVIUM_GENERATOR_MODEL_DIRECTORY"
PYTEST = (sys.executable, "-m", "pytest")
# Every way to load ONNX Runtime, by the shortest command for each, and its exit code.
WAYS = {
    "generator": ([sys.executable, "-m", "generator_svc"], 2),
    "up": ([sys.executable, "-m", "trivium.cli", "up", "--model", "/nowhere"], 2),
    "doctor": ([sys.executable, "-m", "trivium.cli", "doctor", "--model", "/nowhere"], 1),
    "benchmark": ([sys.executable, "-c", "import bench.engine_loop"], 0),
    "device": ([sys.executable, "-c", "import generator_svc.device"], 0),
    "tests": ([*PYTEST, "--collect-only", "-q", "tests/generator_svc/test_generator_runner.py"], 0),
}


def clean_environment(home: Path) -> dict[str, str]:
    """A user's environment with its own home; in CI the runtime would report nothing."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), GENERATOR: "/nowhere"}


def files(home: Path) -> list[str]:
    """The files left behind, except our own."""
    found = (file.relative_to(home).as_posix() for file in home.rglob("*") if file.is_file())
    return [file for file in found if not file.startswith(".cache/trivium/")]


@pytest.mark.parametrize("way", WAYS)
def test_no_telemetry_id_is_left_in_the_users_cache(tmp_path: Path, way: str) -> None:
    """This holds for every way to load ONNX Runtime."""
    command, status = WAYS[way]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(tmp_path), capture_output=True, check=False
    )

    assert status == done.returncode, done.stderr.decode()
    assert [] == files(tmp_path)


def test_an_export_leaves_no_telemetry_id(tmp_path: Path) -> None:
    """The export runs the model to verify it."""
    options = (str(tiny_checkpoint()), "--out", str(tmp_path / "m"), "--precision", "fp32")
    command = [sys.executable, "-m", "generator_svc.export", *options]
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(command, cwd=ROOT, env=clean_environment(home), check=True)

    assert [] == files(home)


def test_services_make_no_outgoing_calls(tiny_model: Path, tmp_path: Path) -> None:
    """All three services make no outgoing calls from start to end, with a request in between."""
    isolated = ("unshare", "--map-root-user", "--net")
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not available")
    up = (sys.executable, "-m", "trivium.cli", "up", "--device", "cpu", "--model", str(tiny_model))
    done = subprocess.run(
        [*isolated, sys.executable, str(OFFLINE), SECONDS, *up],
        cwd=ROOT,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )

    counts = json.loads(done.stdout)
    assert {"answered": 200, "ended": 0} == {
        name: counts.pop(name) for name in ("answered", "ended")
    }
    assert set(counts.values()) == {0}, counts
    assert [] == files(tmp_path)
