"""A model folder is good, or the refusal says in one line which file is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model_directory
from trivium.model_directory import ModelDirectoryError, load_model_directory


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_directory(), tmp_path / "tiny"))


@pytest.fixture
def foreign(folder) -> Path:
    """As another tool makes it: no manifest, the template within tokenizer_config.json."""
    (folder / "trivium_export.json").unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    return folder


def edit(file: Path, *keys: str, value: object) -> None:
    content = json.loads(file.read_text())
    target = content
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    file.write_text(json.dumps(content))


def test_sizes_and_names_are_read(folder):
    """Everything the services need to know stands in the value."""
    model = load_model_directory(folder)

    assert (model.id, model.num_layers, model.num_kv_heads, model.head_size) == ("tiny", 3, 2, 16)
    assert (model.num_attention_heads, model.hidden_size) == (4, 64)
    assert (model.context_length, model.eos_token_ids) == (2048, (2,))
    assert (model.bos_token_id, model.pad_token_id) == (1, 0)
    assert (model.family, model.precision) == ("llama", "fp32")
    assert model.names.past_key % 1 == "past_key_values.1.key"
    assert model.graph.is_file()
    assert model.chat_template == folder / "chat_template.jinja"
    assert model.generation_config["eos_token_id"] == 2


def test_a_foreign_folder_loads(foreign):
    """Manifest, template file and sampling defaults are optional."""
    model = load_model_directory(foreign)

    assert model.chat_template is None
    assert model.generation_config == {}
    assert model.precision is None


@pytest.mark.parametrize("eos", [[2, 0], 2])
def test_eos_may_be_one_id_or_a_list(foreign, eos):
    """Both forms are in use."""
    edit(foreign / "genai_config.json", "model", "eos_token_id", value=eos)

    assert load_model_directory(foreign).eos_token_ids == ((2, 0) if eos != 2 else (2,))


def test_the_revision_follows_the_content_and_not_the_place(folder, tmp_path):
    """A copy has the same revision; another tokenizer or other weights have another."""
    revision = load_model_directory(folder).revision
    copy = shutil.copytree(folder, tmp_path / "other")
    assert load_model_directory(copy).revision == revision
    assert 16 <= len(revision) <= 64

    for name in ("tokenizer.json", "model.onnx.data"):
        content = bytearray((copy / name).read_bytes())
        content[-2] ^= 1
        (copy / name).write_bytes(content)
        changed = load_model_directory(copy).revision
        assert changed != revision
        revision = changed


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"]
)
def test_a_missing_file_is_named(folder, name):
    """With a manifest every file of the export is known."""
    (folder / name).unlink()

    with pytest.raises(ModelDirectoryError, match=rf"{name} is missing"):
        load_model_directory(folder)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named_without_a_manifest(foreign, name):
    """Without one the files that every folder needs are."""
    (foreign / name).unlink()

    with pytest.raises(ModelDirectoryError, match=rf"{name} is missing"):
        load_model_directory(foreign)


def test_truncated_weights_are_refused(folder):
    """A copy that broke off would read beyond the end of the file."""
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)

    with pytest.raises(ModelDirectoryError, match=r"model.onnx.data has 1000 bytes instead of"):
        load_model_directory(folder)


def test_no_folder_no_model(tmp_path):
    """Missing, empty and not a folder are three different things."""
    with pytest.raises(ModelDirectoryError, match="no such model folder"):
        load_model_directory(tmp_path / "nothing")
    with pytest.raises(ModelDirectoryError, match="is empty"):
        load_model_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelDirectoryError, match="is a file"):
        load_model_directory(tmp_path / "file")


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}', '{"model": {"decoder": {}}}', ""])
def test_a_broken_configuration_is_refused(foreign, text):
    """The message names the file and stays on one line."""
    (foreign / "genai_config.json").write_text(text)

    with pytest.raises(ModelDirectoryError, match=r"genai_config.json") as caught:
        load_model_directory(foreign)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, "8", None, True])
def test_a_senseless_size_is_refused(foreign, value):
    """Counts are positive integers."""
    edit(foreign / "genai_config.json", "model", "decoder", "head_size", value=value)

    with pytest.raises(ModelDirectoryError, match="'head_size' is not a positive integer"):
        load_model_directory(foreign)
