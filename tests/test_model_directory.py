"""A model folder is valid, or the error says in one line which file is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model_directory
from trivium.model_directory import MANIFEST, ModelDirectoryError, load_model_directory

MIB = 2**20
LARGE = 20 * MIB  # digests are cached for files above 16 MiB
LOAD = """
import sys
from trivium.model_directory import load_model_directory
def bytes_read():
    return int(open("/proc/self/io").read().split()[1])
before = bytes_read()
print(load_model_directory(sys.argv[1]).revision, bytes_read() - before)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_directory(), tmp_path / "tiny"))


@pytest.fixture
def foreign(folder) -> Path:
    """A folder made by another tool: no manifest, the template in tokenizer_config.json."""
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
    """The value has everything that the services need."""
    model = load_model_directory(folder)

    assert (model.id, model.num_layers, model.num_kv_heads, model.head_size) == ("tiny", 3, 2, 16)
    assert (model.context_length, model.eos_token_ids) == (2048, (2,))
    assert (model.family, model.precision) == ("llama", "fp32")
    assert model.names.past_key % 1 == "past_key_values.1.key"
    assert model.graph.is_file()
    assert model.chat_template == folder / "chat_template.jinja"
    assert model.generation_config["eos_token_id"] == 2


def test_a_third_party_folder_loads(foreign):
    """Manifest, template file and sampling defaults are optional."""
    model = load_model_directory(foreign)

    assert model.chat_template is None
    assert model.generation_config == {}
    assert model.precision is None


def test_unused_values_may_be_missing(foreign):
    """genai_config.json needs only the values that serving reads."""
    file = foreign / "genai_config.json"
    content = json.loads(file.read_text())
    for name in ("num_attention_heads", "hidden_size"):
        del content["model"]["decoder"][name]
    for name in ("bos_token_id", "pad_token_id"):
        content["model"].pop(name, None)
    file.write_text(json.dumps(content))

    assert load_model_directory(foreign).head_size == 16


@pytest.mark.parametrize("eos", [[2, 517], 517, [-1, 2, 2**70]])
def test_eos_outside_the_vocabulary_is_ignored(foreign, caplog, eos):
    """The model cannot generate it, for example if the embeddings were not resized for it."""
    edit(foreign / "genai_config.json", "model", "vocab_size", value=517)
    edit(foreign / "genai_config.json", "model", "eos_token_id", value=eos)

    assert load_model_directory(foreign).eos_token_ids == (() if eos == 517 else (2,))
    assert "'eos_token_id' has ids outside the vocabulary of 517 tokens" in caplog.text


@pytest.mark.parametrize("eos", [[2, 0], 2])
def test_eos_may_be_one_id_or_a_list(foreign, eos):
    """Both forms are in use."""
    edit(foreign / "genai_config.json", "model", "eos_token_id", value=eos)

    assert load_model_directory(foreign).eos_token_ids == ((2, 0) if eos != 2 else (2,))


def test_the_revision_depends_on_the_content_only(folder, tmp_path):
    """A copy has the same revision; another tokenizer or other weights change it."""
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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder for this test."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(foreign) -> Path:
    """A folder with large weights, written a while ago."""
    with (foreign / "model.onnx.data").open("r+b") as file:
        file.truncate(LARGE)
    time.sleep(2.1)  # files that have just changed would be read again
    return foreign


def flip(file: Path, position: int) -> None:
    """Flips one bit in place."""
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1]))


def load_in_another_process(folder: Path) -> tuple[str, int]:
    """The revision according to another process, and the bytes that process read for it."""
    command = [sys.executable, "-c", LOAD, str(folder)]
    revision, read = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()
    return revision, int(read)


def test_any_byte_of_the_weights_changes_the_revision(large):
    """This holds in the middle of a large file too, and even if its modification time is reset."""
    weights = large / "model.onnx.data"
    before, times = load_model_directory(large).revision, weights.stat()

    for position in (0, 2 * MIB, LARGE // 2, LARGE - 2 * MIB, LARGE - 1):
        for keep_times in (False, True):
            flip(weights, position)
            if keep_times:
                os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert before != load_model_directory(large).revision
            flip(weights, position)
            assert before == load_model_directory(large).revision


def test_a_copy_of_large_weights_has_the_same_revision(large, tmp_path):
    """It has on every machine, whatever the copy's timestamps."""
    for copy in (shutil.copyfile, shutil.copy2):
        other = shutil.copytree(large, tmp_path / copy.__name__, copy_function=copy)
        assert load_model_directory(large).revision == load_model_directory(other).revision


def test_large_weights_are_read_once(large):
    """The first process on a machine reads them; the others use the cached digest."""
    first, read_first = load_in_another_process(large)
    second, read_second = load_in_another_process(large)

    assert first == second == load_model_directory(large).revision
    assert read_first > LARGE
    assert read_second < LARGE / 10


def test_reading_large_weights_is_logged(foreign, caplog):
    """A gigabyte or more takes a while, which should not look like a hang."""
    load_model_directory(foreign)
    assert "" == caplog.text

    with (foreign / "model.onnx.data").open("r+b") as file:
        file.truncate(2**30)
    load_model_directory(foreign)

    assert f"computing the digest of {foreign / 'model.onnx.data'} (1.1 GB)" in caplog.text


def test_processes_that_start_together_agree(large):
    """Each may read the digest while another writes it."""
    command = [sys.executable, "-c", LOAD, str(large)]
    together = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    revisions = {process.communicate()[0].split()[0] for process in together}

    assert {load_model_directory(large).revision} == revisions
    assert [0] * 4 == [process.returncode for process in together]


def test_digests_of_just_modified_files_are_not_cached(foreign):
    """A file system's timestamp may be the same for two changes."""
    weights = foreign / "model.onnx.data"
    with weights.open("r+b") as file:
        file.truncate(LARGE)
    revision, _ = load_in_another_process(foreign)

    again, read = load_in_another_process(foreign)

    assert revision == again
    assert read > LARGE


def test_an_unwritable_cache_is_not_an_error(large, monkeypatch, caplog):
    """The revision is the same; the log says that it is not cached, and why."""
    revision = load_model_directory(large).revision

    for place in ("/sys/trivium", "/dev/null/trivium"):  # even root cannot create these
        monkeypatch.setenv("TRIVIUM_CACHE", place)
        assert revision == load_model_directory(large).revision
        assert place in caplog.text


def test_a_missing_home_is_not_an_error(large, monkeypatch):
    """In a container the user may be just a number."""
    revision = load_model_directory(large).revision
    for name in ("TRIVIUM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)

    assert revision == load_model_directory(large).revision


def test_a_corrupt_cache_is_not_an_error(large, cache):
    """Unreadable entries are computed again."""
    revision = load_model_directory(large).revision
    [entry] = [file for file in cache.rglob("*") if file.is_file()]

    for content in (b"", b"{", b"[]", b"{}", b'{"sha256": 1, "size": 2}', b"\xff"):
        entry.write_bytes(content)
        assert revision == load_model_directory(large).revision
        assert "sha256" in json.loads(entry.read_text())


def test_weights_of_any_name_count(foreign):
    """The graph names its files."""
    for file in (foreign / "model.onnx", foreign / "genai_config.json"):
        file.write_bytes(file.read_bytes().replace(b"model.onnx.data", b"tensors-of-it.w"))
    weights = (foreign / "model.onnx.data").rename(foreign / "tensors-of-it.w")
    model = load_model_directory(foreign)

    flip(weights, weights.stat().st_size // 2)

    assert (weights,) == model.weights
    assert model.weight_bytes > weights.stat().st_size
    assert model.revision != load_model_directory(foreign).revision


def test_an_exports_manifest_has_its_digests(tmp_path):
    """A new export is not read again; its manifest has the same digests as `sha256sum`."""
    folder = tiny_model_directory()
    _, read = load_in_another_process(folder)
    digests = json.loads((folder / MANIFEST).read_text())["digests"]
    command = ["sha256sum", *sorted(digests)]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout

    assert read < (folder / "model.onnx.data").stat().st_size / 2
    assert set(digests) == {file.name for file in folder.iterdir()} - {MANIFEST}
    assert told.split()[::2] == [digests[name]["sha256"] for name in sorted(digests)]


def test_an_old_export_without_digests_has_the_same_revision(folder):
    """It need not be exported again, and has the same revision."""
    revision = load_model_directory(folder).revision
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digests"]
    (folder / MANIFEST).write_text(json.dumps(manifest))

    assert revision == load_model_directory(folder).revision


def test_a_modified_export_logs_a_warning(folder, caplog):
    """A corrupt copy looks just like an intentional change."""
    load_model_directory(folder)
    assert "" == caplog.text

    flip(folder / "model.onnx.data", 500_000)
    load_model_directory(folder)

    assert f"{folder / 'model.onnx.data'} has changed since the export" in caplog.text


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
    """Without a manifest the files that every folder needs are."""
    (foreign / name).unlink()

    with pytest.raises(ModelDirectoryError, match=rf"{name} is missing"):
        load_model_directory(foreign)


def test_truncated_weights_are_refused(folder):
    """Loading a truncated copy would read beyond the end of the file."""
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)

    with pytest.raises(ModelDirectoryError, match=r"model.onnx.data has 1000 bytes instead of"):
        load_model_directory(folder)


def test_a_path_that_is_not_a_model_folder_is_refused(tmp_path):
    """Missing, empty and not a folder are three different errors."""
    with pytest.raises(ModelDirectoryError, match="no such model folder"):
        load_model_directory(tmp_path / "nothing")
    with pytest.raises(ModelDirectoryError, match="is empty"):
        load_model_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelDirectoryError, match="is a file"):
        load_model_directory(tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[]", '{"model": 3}', '{"model": {"decoder": {}}}', ""]
)
def test_a_broken_configuration_is_refused(foreign, text):
    """The message is one line that names the file."""
    (foreign / "genai_config.json").write_text(text)

    with pytest.raises(ModelDirectoryError, match=r"genai_config.json") as caught:
        load_model_directory(foreign)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["past.key", "past.%d.key.%d", "past.%s.key", 5, None])
def test_an_invalid_graph_name_is_refused(foreign, name):
    """The names of the cache's tensors have a place for the number of the layer."""
    edit(foreign / "genai_config.json", "model", "decoder", "inputs", "past_key_names", value=name)

    with pytest.raises(ModelDirectoryError, match=r"genai_config.json: 'past_key_names' "):
        load_model_directory(foreign)


@pytest.mark.parametrize("value", [0, -1, "8", None, True])
def test_an_invalid_size_is_refused(foreign, value):
    """Sizes are positive integers."""
    edit(foreign / "genai_config.json", "model", "decoder", "head_size", value=value)

    with pytest.raises(ModelDirectoryError, match="'head_size' is not a positive integer"):
        load_model_directory(foreign)
