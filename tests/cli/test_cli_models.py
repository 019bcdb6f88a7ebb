"""`trivium up` with a checkpoint: it is exported once and served under the given name."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.model_hub import ModelHub
from tests.ports import free_ports
from tests.tiny_models import tiny_checkpoint
from trivium.cli.main import app
from trivium.cli.models import find_model

PORTS = ("tokenizer-port", "tokenizer-metrics-port", "generator-port", "generator-metrics-port")
NO_EXPORT_EXTRA = "import sys\nsys.modules.update(torch=None, optimum=None)\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches for Trivium and for the hub; returns the first."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    with ModelHub().served() as hub:
        hub.add("acme/tiny", tiny_checkpoint("llama"))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def cached(source: str, *options: str, **environment: str) -> tuple[int, Path]:
    """Exit status of the command that `trivium up` runs first, and the folder it prints."""
    command = [sys.executable, "-m", "generator_svc.export.cached", source, *options]
    env = {**os.environ, **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    return done.returncode, Path(done.stdout.strip())


@pytest.mark.pipeline
def test_hub_model_is_served_by_name(hub: ModelHub, cache: Path) -> None:
    """One command suffices, and requests may use the hub's name, as with vLLM."""
    port, *others = free_ports(5)
    ports = [f"--{name}={number}" for name, number in zip(PORTS, others, strict=True)]
    command = [sys.executable, "-m", "trivium.cli", "up", "--model", "acme/tiny", f"--port={port}"]
    small = {"TRIVIUM_GENERATOR_SLOTS": "2", "TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH": "512"}
    with subprocess.Popen(
        [*command, *ports], env={**os.environ, **small}, stdout=subprocess.PIPE, text=True
    ) as up:
        try:
            assert up.stdout is not None
            shown = next(line for line in up.stdout if line.startswith("  model "))
            answers = [
                httpx.post(
                    f"http://127.0.0.1:{port}/v1/completions",
                    json={"model": name, "prompt": "Hello", "max_tokens": 2},
                    timeout=60,
                ).json()
                for name in ("tiny", "acme/tiny")
            ]
        finally:
            up.send_signal(signal.SIGINT)
            up.stdout.read() if up.stdout else None

    assert up.returncode == 0
    assert "tiny or acme/tiny  (revision" in shown
    assert ["tiny", "tiny"] == [answer["model"] for answer in answers]
    assert [2, 2] == [answer["usage"]["completion_tokens"] for answer in answers]
    assert cache in cached("acme/tiny", "--check")[1].parents


def test_hub_model_is_exported_once(hub: ModelHub, tmp_path: Path) -> None:
    """The next start needs neither the hub nor the export extra."""
    made = cached("acme/tiny")
    asked = len(hub.requests)
    (tmp_path / "sitecustomize.py").write_text(NO_EXPORT_EXTRA)

    assert made == cached("acme/tiny", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert (0, "tiny") == (made[0], made[1].name)
    assert asked == len(hub.requests)


def test_changed_local_checkpoint_is_exported_again(tmp_path: Path) -> None:
    """After further fine-tuning, the old export is not served."""
    checkpoint = tmp_path / "mine" / "tuned"
    shutil.copytree(tiny_checkpoint("llama"), checkpoint)
    made, folder = cached(str(checkpoint))
    kept, _ = cached(str(checkpoint), "--check")
    os.utime(checkpoint / "model.safetensors")
    changed, _ = cached(str(checkpoint), "--check")

    assert ("tuned", [0, 0, 1]) == (folder.name, [made, kept, changed])


def test_model_folder_next_to_its_checkpoint_is_served_as_is(tiny_folder: Path) -> None:
    """As in repositories that publish both."""
    (tiny_folder / "model.safetensors").touch()

    assert tiny_folder == find_model(str(tiny_folder), "cpu").folder


def test_checkpoints_with_the_same_name_do_not_collide(tmp_path: Path) -> None:
    """Each path and each name on the hub gets a folder of its own."""
    sources = [str(tmp_path / "a" / "tiny"), str(tmp_path / "b" / "tiny.gguf")]
    sources += ["acme/tiny", "other/tiny", "acme/tiny@v2"]
    found = [cached(source, "--check") for source in sources]

    assert {(1, "tiny")} == {(status, folder.name) for status, folder in found}
    assert len(sources) == len({folder for _, folder in found})


def test_exporters_error_is_shown(
    hub: ModelHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The exporter's message is shown and nothing is started."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no tensors")
    statuses = [
        CliRunner().invoke(app, ["up", "--model", name]).exit_code
        for name in ("acme/absent", str(tmp_path / "broken"))
    ]
    output = capfd.readouterr().err

    assert [1, 1] == statuses
    assert f"acme/absent: no such folder, and {hub.url} has no such model" in output
    assert "broken: has weights but no config.json" in output
