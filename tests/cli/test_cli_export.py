"""`trivium export`: a folder that serves, or a sentence that says why not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_models import tiny_checkpoint
from trivium.cli.embedded import EMBEDDED_MODEL, find_embedded
from trivium.cli.main import app
from trivium.cli.up import resolve_model
from trivium.model_directory import MANIFEST, load_model_directory


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *arguments])
    return result.exit_code, result.output


def test_makes_a_model_folder(tmp_path: Path) -> None:
    """A checkpoint becomes a folder that is whole, and one is told how to serve it."""
    out = tmp_path / "my-model"
    status, output = run(str(tiny_checkpoint("llama")), "--out", str(out), "--precision", "fp32")

    model = load_model_directory(out)
    assert status == 0
    assert ("my-model", "fp32") == (model.id, model.precision)
    assert f"trivium up --model {out}" in output


def test_says_why_a_source_is_none(tmp_path: Path) -> None:
    """What is no checkpoint is named, the status is 1, and nothing is left behind."""
    status, output = run("no such thing", "--out", str(tmp_path / "model"))

    assert status == 1
    assert "'no such thing'" in output
    assert not (tmp_path / "model").exists()


def test_says_what_cannot_be_combined(tmp_path: Path) -> None:
    """float16 on a CPU is refused with the reason."""
    status, output = run("any", "--out", str(tmp_path / "model"), "--precision", "fp16")

    assert status == 1
    assert "fp16 is for cuda" in output


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the export extra one is told what to type."""
    monkeypatch.setattr("trivium.cli.export.NEEDED", ("no_such_package",))
    status, output = run("any", "--out", str(tmp_path / "model"))

    assert status == 2
    assert "no_such_package" in output
    assert "pip install 'trivium[export]'" in output


def test_the_embedded_model_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no model named, `up` serves what is in the cache folder under the embedded name."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    absent = find_embedded()
    out = tmp_path / "models" / EMBEDDED_MODEL
    run(str(tiny_checkpoint("llama")), "--out", str(out), "--precision", "fp32")

    assert absent is None
    assert [out, out] == [resolve_model(None), resolve_model(EMBEDDED_MODEL)]


def test_an_embedded_model_that_this_processor_cannot_run_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when machines share a cache, and only some of them multiply bytes exactly."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    out = tmp_path / "models" / EMBEDDED_MODEL
    run(str(tiny_checkpoint("llama")), "--out", str(out), "--precision", "fp32")
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "precision": "w8a8"}))

    found = {}
    for exact in (True, False):
        monkeypatch.setattr(
            "generator_svc.device.multiplies_bytes_exactly", lambda exact=exact: exact
        )
        found[exact] = find_embedded() is not None

    assert found == {True: True, False: False}
