"""`trivium export`: a folder that can be served, or a message that says why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from generator_svc.export.cached import find_embedded
from tests.tiny_models import tiny_checkpoint, tiny_model_directory
from trivium.cli.models import find_model
from trivium.embedded_model import EMBEDDED_MODEL, embedded_folder
from trivium.model_directory import MANIFEST, load_model_directory

TRIVIUM = (sys.executable, "-m", "trivium.cli")


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and combined output of `trivium export`."""
    done = subprocess.run(
        [*TRIVIUM, "export", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_makes_a_model_folder(tmp_path: Path) -> None:
    """A checkpoint becomes a complete folder, and the output says how to serve it."""
    out = tmp_path / "my-model"
    status, output = run(str(tiny_checkpoint("llama")), "--out", str(out), "--precision", "fp32")

    model = load_model_directory(out)
    assert status == 0
    assert ("my-model", "fp32") == (model.id, model.precision)
    assert f"trivium up --model {out}" in output


def test_invalid_source_is_refused(tmp_path: Path) -> None:
    """A source that is no checkpoint is named, the status is 1, and nothing is left behind."""
    status, output = run("no such thing", "--out", str(tmp_path / "model"))

    assert status == 1
    assert "'no such thing'" in output
    assert not (tmp_path / "model").exists()


def test_float16_on_the_cpu_is_refused(tmp_path: Path) -> None:
    """float16 on the CPU is refused with the reason."""
    status, output = run("any", "--out", str(tmp_path / "model"), "--precision", "fp16")

    assert status == 1
    assert "fp16 is for cuda" in output


def test_missing_export_extra_is_named(tmp_path: Path) -> None:
    """Without the export extra, the message says how to install it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['gguf'] = None\n")
    status, output = run("any", "--out", str(tmp_path / "model"), PYTHONPATH=str(tmp_path))

    assert status == 2
    assert "not installed: gguf." in output
    assert "pip install 'trivium[export]'" in output


@pytest.mark.parametrize("module", [("trivium.cli", "export"), ("generator_svc.export",)])
def test_explains_its_options(module: tuple[str, ...]) -> None:
    """The exporter's own module is the same command."""
    command = [sys.executable, "-m", *module, "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "Usage: trivium export [OPTIONS]" in output
    assert {"--out", "--precision", "--device", "--force"} <= set(output.split())


def test_sigint_stops_the_export(tmp_path: Path) -> None:
    """SIGINT from a shell, container or supervisor ends it, and nothing half-made is left."""
    source, out = str(tiny_checkpoint("llama")), tmp_path / "models" / "model"
    process = subprocess.Popen(
        [*TRIVIUM, "export", source, "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    while not (out.parent / ".model.partial").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=120)

    assert process.returncode == 130
    assert output.splitlines()[-1] == f"trivium export: interrupted; {out} is unchanged"
    assert "Traceback" not in output
    assert [".model.lock"] == [path.name for path in out.parent.iterdir()]


SWALLOWS = """
import os, signal
from generator_svc.export import __main__ as command

def export_model(source, out, options, progress, **_):
    progress("importing")
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except:
        pass
    progress("tracing")

command.export_model = export_model
command.app(["any", "--out", "m"])
"""


def test_sigint_stops_the_export_although_a_library_swallows_it() -> None:
    """Some do while being imported; the export then ends before its next step."""
    done = subprocess.run([sys.executable, "-c", SWALLOWS], capture_output=True, text=True)

    assert done.returncode == 130
    expected = ["importing", "trivium export: interrupted; m is unchanged"]
    assert expected == done.stderr.splitlines()


def put_embedded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a model folder in the embedded model's place, in a cache of its own."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(cache))
    shutil.copytree(tiny_model_directory("llama"), embedded_folder())
    return embedded_folder()


def test_the_embedded_model_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no model named, `up` serves what is in the cache folder under the embedded name."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    check = [sys.executable, "-m", "generator_svc.export.cached", "--check"]
    absent = subprocess.run(check).returncode
    out = put_embedded(tmp_path, monkeypatch)

    assert (1, 0) == (absent, subprocess.run(check).returncode)
    assert tmp_path / "models" / EMBEDDED_MODEL == out
    assert [out, out] == [find_model(EMBEDDED_MODEL, device).folder for device in ("auto", "cpu")]


def test_embedded_model_for_a_missing_device_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is printed and nothing is exported."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    made = [sys.executable, "-m", "generator_svc.export.cached", "--device", "cuda"]
    done = subprocess.run(
        made, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )

    assert (2, "") == (done.returncode, done.stdout)
    assert "trivium: device cuda is unavailable: no CUDA device found" in done.stderr
    assert [] == list(tmp_path.iterdir())


def test_embedded_model_that_this_cpu_cannot_run_is_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when machines share a cache but only some of them multiply bytes exactly."""
    out = put_embedded(tmp_path, monkeypatch)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "precision": "w8a8"}))

    found = {}
    for exact in (True, False):
        monkeypatch.setattr(
            "generator_svc.device.multiplies_bytes_exactly", lambda exact=exact: exact
        )
        found[exact] = find_embedded("cpu") is not None

    assert found == {True: True, False: False}
