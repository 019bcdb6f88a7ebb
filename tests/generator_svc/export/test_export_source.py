"""What a source may be, and the messages if something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from generator_svc.export import ExportError
from generator_svc.export.checkpoint.source import locate

INDEX = "model.safetensors.index.json"


def folder(path: Path, *names: str, **shards: str) -> Path:
    """A folder with empty files, and an index of `shards` (tensor → file) if there are any."""
    path.mkdir(parents=True)
    for name in names:
        (path / name).touch()
    if shards:
        (path / INDEX).write_text(json.dumps({"weight_map": shards}))
    return path


def refusal(source: str | Path) -> str:
    """The message, a single line."""
    with pytest.raises(ExportError) as error:
        locate(str(source))
    assert 1 == len(str(error.value).splitlines())
    return str(error.value)


def test_folders_and_files(tmp_path: Path) -> None:
    """Safetensors in one file or in shards; one GGUF file, as a folder or by its path."""
    single = folder(tmp_path / "single", "config.json", "model.safetensors", "x.gguf")
    sharded = folder(tmp_path / "sharded", "config.json", "1.safetensors", a="1.safetensors")
    gguf = folder(tmp_path / "gguf", "config.json", "x.gguf")
    both = folder(tmp_path / "both", "config.json", "model.safetensors", a="gone.safetensors")
    found = [locate(str(source)) for source in (single, sharded, gguf, gguf / "x.gguf", both)]

    assert [("folder", single), ("folder", sharded)] == [(f.kind, f.path) for f in found[:2]]
    assert [("gguf", gguf / "x.gguf")] * 2 == [(f.kind, f.path) for f in found[2:4]]
    assert ("folder", both) == (found[4].kind, found[4].path)


@pytest.mark.parametrize(
    ("names", "shards", "message"),
    [
        ([], {}, "has neither model.safetensors (or its index of shards) nor a GGUF file; it is e"),
        (["config.json"], {}, "nor a GGUF file; it has config.json"),
        (["config.json", "pytorch_model.bin"], {}, "PyTorch pickles are not supported: save the m"),
        (["model.safetensors"], {}, "has weights but no config.json"),
        (["config.json", "1"], {"a": "1", "b": "2"}, f"{INDEX} names missing files: 2"),
        (["config.json", INDEX], {}, f"{INDEX} is not an index of tensors by file"),
        (["a.gguf", "b.gguf"], {}, "checkpoint/a.gguf: a.gguf, b.gguf"),
        (["a-00001-of-00003.gguf"], {}, "a-00001-of-00003.gguf is one of 3 parts"),
        (list("abcdefghij"), {}, "it has a, b, c, d, e, f, g, h and 2 more"),
    ],
)
def test_incomplete_folder_is_refused(
    tmp_path: Path, names: list[str], shards: dict[str, str], message: str
) -> None:
    """The message names the folder and what is missing, or what it has instead."""
    said = refusal(folder(tmp_path / "checkpoint", *names, **shards))

    assert said.startswith(f"{tmp_path / 'checkpoint'}: ")
    assert message in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is one file of a checkpoint; pass its folder: {folder}"),
        (INDEX, "is one file of a checkpoint; pass its folder: {folder}"),
        ("pytorch_model.bin", "a checkpoint file must be a .gguf file"),
        ("a-00002-of-00003.gguf", "a-00002-of-00003.gguf is one of 3 parts"),
    ],
)
def test_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path, name: str, message: str) -> None:
    """The message says what to pass instead."""
    file = folder(tmp_path / "checkpoint", "config.json", name) / name

    assert message.format(folder=file.parent) in refusal(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/modles/llama", "{tmp}/modles/llama: no such file or folder: {tmp} has no modles"),
        ("{tmp}/models/lama", "no such file or folder: {tmp}/models has no lama"),
        ("{tmp}/models/llama/x.gguf", "no such file or folder: {tmp}/models/llama has no x.gguf"),
        ("./modles", "./modles: no such file or folder: {here} has no modles"),
        ("../no/such/path", "no such file or folder: "),
        ("models/lama.gguf", "no such file or folder: {here} has no models"),
        ("models/llama/7b", "no such file or folder: {here} has no models"),
        (
            "no-such-model",
            "'no-such-model' is neither a folder, a .gguf file, a hub id (owner/name) nor",
        ),
        (
            "https://huggingface.co/acme/tiny",
            "is neither a folder, a .gguf file, a hub id (owner/name)",
        ),
    ],
)
def test_a_misspelt_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    """The message names what is missing and in which folder; no request is made to the hub."""
    folder(tmp_path / "models" / "llama")
    here = folder(tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.setattr("generator_svc.export.checkpoint.source.fetch", None)

    assert message.format(tmp=tmp_path, here=here) in refusal(source.format(tmp=tmp_path))


def test_the_embedded_model_needs_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is just a number has no home folder; the message says what to set."""
    for name in ("TRIVIUM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)

    assert "the home folder is unknown: set TRIVIUM_CACHE" in refusal("smollm2-135m-instruct")
