"""A checkpoint from a hub: what is fetched, resumed and reused from the cache, and messages.

huggingface_hub reads its settings when it is imported, so each download has its own process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.model_hub import ModelHub
from tests.tiny_models import tiny_checkpoint
from trivium.model_directory import load_model_directory

ROOT = Path(__file__).parents[3]
LOCATE = """
import resource, shutil, sys
from generator_svc.export import ExportError
from generator_svc.export.checkpoint.source import locate
source, before = sys.argv[1:]
exec(before)
try:
    found = locate(source, progress=lambda done, total: print(done, total, sep="/"))
except ExportError as error:
    sys.exit(f"error: {error}")
print(found.kind, found.path)
"""
CHUNK = 10 * 2**20  # what huggingface_hub keeps in memory before it writes
SMALL = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def hub() -> Iterator[ModelHub]:
    with ModelHub().served() as hub:
        yield hub


class User:
    """A user with their own cache and environment."""

    def __init__(self, home: Path, hub: ModelHub) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.environment = kept | {
            "HF_HOME": str(home),
            "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1",
            "TRANSFORMERS_OFFLINE": "",
            "TQDM_POSITION": "-1",  # makes huggingface_hub show bars without a terminal
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def locate(self, source: str, before: str = "", **environment: str) -> tuple[str, list[str]]:
        """Kind and path, or the error message, and the progress lines."""
        process = self.start("-c", LOCATE, source, before, **environment)
        output, errors = process.communicate(timeout=300)
        lines = output.splitlines()
        if process.returncode == 0:
            assert errors == ""  # no bars, no warnings
            return lines[-1], lines[:-1]
        assert errors.startswith("error: "), errors
        assert len(errors.splitlines()) == 1
        return errors.removeprefix("error: ").strip(), lines


@pytest.fixture
def user(tmp_path: Path, hub: ModelHub) -> User:
    return User(tmp_path / "home", hub)


def files(*names: str, **content: bytes) -> dict[str, bytes | Path]:
    """A repository's files with meaningless content, except for those given in `content`."""
    own = {"config.json": b'{"model_type": "llama"}'}
    return {**{name: own.get(name, name.encode()) for name in names}, **content}


def in_shards() -> dict[str, bytes | Path]:
    """The text side of a checkpoint and two shards with their index."""
    shards = {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}
    return files(*SMALL, *SHARDS) | {INDEX: json.dumps({"weight_map": shards}).encode()}


def test_only_needed_files_are_downloaded(hub: ModelHub, user: User) -> None:
    """No other formats, no copies in subfolders, no shards that the index does not name."""
    hub.models["acme/tiny"] = {
        "main": in_shards()
        | files(
            "README.md",
            ".gitattributes",
            "USE_POLICY.md",
            "consolidated.safetensors",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model.bin.index.json",
            "tf_model.h5",
            "tiny-Q4_K_M.gguf",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
            "original/consolidated.00.pth",
            "original/model.safetensors",
            "metal/model.bin",
            "onnx/model.onnx",
        )
    }
    found, _ = user.locate("acme/tiny")

    commit = hub.commit("acme/tiny", "main")
    assert found == f"folder {user.home}/hub/models--acme--tiny/snapshots/{commit}"
    assert sorted([*SMALL, *SHARDS, INDEX]) == hub.fetched()
    assert not [request.path for request in hub.requests if "xet" in request.path]


def test_a_tokenizer_without_tokenizer_json(hub: ModelHub, user: User) -> None:
    """Then the files from which it can be built are fetched too."""
    names = ("config.json", "model.safetensors", "tokenizer.model", "vocab.json", "merges.txt")
    hub.models["acme/slow"] = {"main": files(*names, "README.md")}
    user.locate("acme/slow")

    assert sorted(names) == hub.fetched()


def test_interrupted_download_is_resumed(hub: ModelHub, user: User) -> None:
    """Each byte is sent once, although the connection breaks off twice."""
    content = os.urandom(3 * CHUNK + 5)
    hub.models["acme/large"] = {"main": files(*SMALL) | {"model.safetensors": content}}
    hub.cuts["model.safetensors"] = [CHUNK, CHUNK]
    found, progress = user.locate("acme/large")

    path = Path(found.split()[1])
    assert content == (path / "model.safetensors").read_bytes()
    assert len(content) == hub.sent["model.safetensors"]
    total = sum(map(len, hub.models["acme/large"]["main"].values()))
    assert f"{total}/{total}" == progress[-1]
    assert progress == sorted(progress, key=lambda line: int(line.split("/")[0]))


def test_download_without_progress_is_reported(hub: ModelHub, user: User) -> None:
    """The user is told, and the next run resumes from there."""
    content = os.urandom(2 * CHUNK)
    hub.models["acme/large"] = {"main": files(*SMALL) | {"model.safetensors": content}}
    hub.cuts["model.safetensors"] = [CHUNK, 0]
    message, _ = user.locate("acme/large")
    found, _ = user.locate("acme/large")

    assert message.startswith("acme/large: the download was interrupted (")
    assert message.endswith("; run the command again to resume it")
    assert content == (Path(found.split()[1]) / "model.safetensors").read_bytes()
    assert len(content) == hub.sent["model.safetensors"]


def test_download_resumes_after_ctrl_c(hub: ModelHub, user: User, tmp_path: Path) -> None:
    """The process ends without waiting for a shard, and the next one fetches only the rest."""
    content = os.urandom(3 * CHUNK)
    hub.models["acme/large"] = {"main": files(*SMALL) | {"model.safetensors": content}}
    hub.stalls["model.safetensors"] = [CHUNK]
    out = tmp_path / "models" / "large"
    command = ("-m", "trivium.cli", "export", "acme/large", "--out", str(out))
    process = user.start(*command, HF_HUB_DOWNLOAD_TIMEOUT="120")  # no retry before the signal
    try:
        wait_for_partial(user, CHUNK)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    sent = hub.sent["model.safetensors"]
    found, progress = user.locate("acme/large")

    assert CHUNK == sent
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"trivium export: interrupted; {out} is unchanged"
    assert "Traceback" not in errors
    assert [out.parent / ".large.lock"] == list(out.parent.iterdir())
    assert content == (Path(found.split()[1]) / "model.safetensors").read_bytes()
    assert len(content) == hub.sent["model.safetensors"]
    assert int(progress[0].split("/")[0]) >= CHUNK


def wait_for_partial(user: User, size: int) -> None:
    """Waits for a partial file of `size` bytes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(path.stat().st_size == size for path in user.home.rglob("*.incomplete")):
            return
        time.sleep(0.05)
    raise AssertionError("nothing arrived")


def test_corrupt_partial_file_is_downloaded_again(hub: ModelHub, user: User) -> None:
    """Its digest is wrong: it is reported, removed, and fetched again by the next run."""
    hub.models["acme/tiny"] = {"main": files(*SMALL, "model.safetensors")}
    found, _ = user.locate("acme/tiny")
    path = Path(found.split()[1]) / "model.safetensors"
    blob = path.resolve()
    path.unlink()
    blob.rename(f"{blob}.incomplete").write_bytes(bytes(5))
    message, _ = user.locate("acme/tiny")
    again, _ = user.locate("acme/tiny")

    assert "acme/tiny: the download of model.safetensors was corrupt" in message
    assert found == again
    assert path.read_bytes() == b"model.safetensors"


@pytest.mark.parametrize("where", ["variable", "file"])
def test_token_is_only_sent_to_the_hub(hub: ModelHub, user: User, where: str) -> None:
    """From HF_TOKEN or the file of `hf auth login`; it is not sent to where the hub redirects."""
    hub.models["acme/gated"] = {"main": files(*SMALL, "model.safetensors")}
    hub.gated, hub.tokens = {"acme/gated": "hf_secret"}, {"hf_secret"}
    environment = {"HF_TOKEN": "hf_secret"} if where == "variable" else {}
    user.home.mkdir()
    if where == "file":
        (user.home / "token").write_text("hf_secret\n")
    found, _ = user.locate("acme/gated", **environment)

    seen = {(request.host, request.token) for request in hub.requests}
    assert found.startswith("folder ")
    assert {("hub", "hf_secret"), ("cdn", None)} == seen


def test_offline_from_the_cache(hub: ModelHub, user: User) -> None:
    """A complete cache entry is used without a request, and also if the hub is down."""
    hub.models["acme/tiny"] = {"main": in_shards()}
    found, _ = user.locate("acme/tiny")
    hub.requests.clear()
    offline, _ = user.locate("acme/tiny", HF_HUB_OFFLINE="1")
    asked = len(hub.requests)
    unreachable, _ = user.locate("acme/tiny", HF_ENDPOINT="http://127.0.0.1:1")
    hub.status = HTTPStatus.SERVICE_UNAVAILABLE
    failing, _ = user.locate("acme/tiny")

    assert {found} == {offline, unreachable, failing}
    assert asked == 0


def test_cached_files_are_not_downloaded_again(hub: ModelHub, user: User) -> None:
    """There is one request, for the commit and its list of files, and none for a file."""
    hub.models["acme/tiny"] = {"main": in_shards()}
    found, _ = user.locate("acme/tiny")
    hub.requests.clear()
    again, _ = user.locate("acme/tiny")

    assert found == again
    assert ["/api/models/acme/tiny/revision/main"] == [request.path for request in hub.requests]


def test_offline_with_an_incomplete_cache(hub: ModelHub, user: User) -> None:
    """The message names what the cache lacks."""
    hub.models["acme/tiny"] = {"main": in_shards()}
    absent, _ = user.locate("acme/tiny", HF_HUB_OFFLINE="1")
    found, _ = user.locate("acme/tiny")
    (Path(found.split()[1]) / SHARDS[1]).unlink()
    partial, _ = user.locate("acme/tiny", HF_HUB_OFFLINE="1")

    assert "acme/tiny: offline mode is on (HF_HUB_OFFLINE), and it is not in the cache" in absent
    assert str(user.home / "hub") in absent
    assert f"acme/tiny: {INDEX} names missing files: {SHARDS[1]}" in partial
    assert "offline mode is on" in partial


@pytest.mark.parametrize(
    ("source", "environment", "message"),
    [
        ("acme/gated", {}, "is gated: request access at {url}/acme/gated, then set HF_TOKEN"),
        ("acme/gated", {"HF_TOKEN": "hf_known"}, "is gated, and your token has no access: request"),
        ("acme/none", {}, "has no such model; a private one needs HF_TOKEN"),
        ("acme/none", {"HF_TOKEN": "hf_known"}, "a private one needs another token"),
        ("acme/tiny@v2", {}, "{url}/acme/tiny has no revision 'v2'"),
        ("acme/tiny", {"HF_TOKEN": "hf_wrong"}, "{url} does not accept your token (HF_TOKEN"),
        ("acme--tiny/x..y", {}, "is neither a folder nor a hub id"),
        ("acme--tiny/x..y", {"HF_HUB_OFFLINE": "1"}, "is neither a folder nor a hub id"),
        (
            "acme/tiny",
            {"HF_ENDPOINT": "http://127.0.0.1:1"},
            "http://127.0.0.1:1 cannot be reached (Connection refused), and it is not in the cache",
        ),
        ("acme/pickled", {}, "PyTorch pickles are not supported"),
        ("acme/pickled", {}, "it has README.md, config.json, pytorch_model.bin"),
        ("acme/empty", {}, "it is empty"),
        ("acme/bare", {}, "has weights but no config.json"),
        ("acme/torn", {}, f"{INDEX} names missing files: {SHARDS[0]}, {SHARDS[1]}"),
        ("acme/odd", {}, f"{INDEX} is not an index"),
        ("acme/quants", {}, "has 3 GGUF files; name one, as in acme/quants:q-Q4_K_M.gguf: q-Q4_"),
        ("acme/quants", {}, "q-Q4_K_M.gguf, q-Q8_0.gguf, q-UD-Q8_0.gguf"),
        ("acme/quants:Q2_K", {}, "has no Q2_K; its GGUF files: q-Q4_K_M.gguf, "),
        ("acme/quants:Q8_0", {}, "Q8_0 matches 2 files: q-Q8_0.gguf, q-UD-Q8_0.gguf"),
        ("acme/parts:Q8_0", {}, "one of 2 parts; merge them with llama-gguf-split"),
        ("acme/tiny:Q8_0", {}, "has no Q8_0; its GGUF files: none"),
    ],
)
def test_says_what_is_missing(
    hub: ModelHub, user: User, source: str, environment: dict[str, str], message: str
) -> None:
    """In one line that begins with the source."""
    tiny = in_shards()
    index = {INDEX: tiny[INDEX]}
    hub.models = {
        name: {"main": content}
        for name, content in {
            "acme/tiny": tiny,
            "acme/gated": tiny,
            "acme/pickled": files("config.json", "pytorch_model.bin", "README.md"),
            "acme/empty": {},
            "acme/bare": files("model.safetensors"),
            "acme/torn": files("config.json") | index,
            "acme/odd": files("config.json", INDEX),
            "acme/quants": files("q-Q4_K_M.gguf", "q-Q8_0.gguf", "q-UD-Q8_0.gguf"),
            "acme/parts": files("Q8_0/p-00001-of-00002.gguf"),
        }.items()
    }
    hub.gated, hub.tokens = {"acme/gated": "hf_granted"}, {"hf_known", "hf_granted"}
    said, _ = user.locate(source, **environment)

    assert said.startswith(f"{source}: ")
    assert message.format(url=hub.url) in said


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (HTTPStatus.OK, "{url} does not respond like a model hub"),
        (HTTPStatus.FORBIDDEN, "{url} denied access; your token may lack permission to read"),
        (HTTPStatus.TOO_MANY_REQUESTS, "{url} returned status 429"),
        (HTTPStatus.BAD_GATEWAY, "{url} returned status 502, and it is not in the cache"),
    ],
)
def test_hub_error_status_is_explained(
    hub: ModelHub, user: User, status: HTTPStatus, message: str
) -> None:
    """The message has the status and what it may mean."""
    hub.status = status
    said, _ = user.locate("acme/tiny")

    assert f"acme/tiny: {message.format(url=hub.url)}" in said


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("acme/quants:q-Q4_K_M.gguf", "q-Q4_K_M.gguf"),
        ("acme/quants:Q4_K_M", "q-Q4_K_M.gguf"),
        ("acme/quants:q8_0", "large/q-Q8_0.gguf"),
        ("acme/one", "one.gguf"),
        ("acme/both:Q8_0", "both.Q8_0.gguf"),
    ],
)
def test_a_gguf_file_is_chosen(hub: ModelHub, user: User, source: str, file: str) -> None:
    """By name, by quantisation, or because it is the only one; nothing else is fetched."""
    hub.models = {
        "acme/quants": {"main": files("config.json", "q-Q4_K_M.gguf", "large/q-Q8_0.gguf")},
        "acme/one": {"main": files("one.gguf", "README.md", "config.json")},
        "acme/both": {"main": in_shards() | files("both.Q8_0.gguf")},
    }
    found, _ = user.locate(source)
    offline, _ = user.locate(source, HF_HUB_OFFLINE="1")

    assert [file] == hub.fetched()
    assert found == offline
    kind, path = found.split()
    assert "gguf" == kind
    assert file == Path(path).read_text() == path[-len(file) :]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "model type 'bert' is not supported (supported: llama, "),
        (
            {"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}},
            "is already quantised (awq); export the full-precision checkpoint",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "longrope"}},
            "rope type 'longrope' is not supported",
        ),
    ],
)
def test_unsupported_model_is_not_downloaded(
    hub: ModelHub, user: User, config: dict[str, object], message: str
) -> None:
    """Because config.json is fetched first, and says so."""
    own = {"config.json": json.dumps(config).encode()}
    hub.models["acme/other"] = {"main": in_shards() | own}
    said, _ = user.locate("acme/other")

    assert said.startswith(f"acme/other: {message}")
    assert ["config.json", INDEX] == hub.fetched()


def test_a_revision(hub: ModelHub, user: User) -> None:
    """A branch, a tag, a pull request or a commit; each from its own snapshot."""
    weights = {name: {"model.safetensors": name.encode()} for name in ("main", "v1.0", "refs/pr/3")}
    hub.models["acme/tiny"] = {name: files(*SMALL) | own for name, own in weights.items()}
    found = {}
    for name in ("v1.0", "refs/pr/3", hub.commit("acme/tiny", "main")):
        path = user.locate(f"acme/tiny@{name}")[0].split()[1]
        assert path == user.locate(f"acme/tiny@{name}", HF_HUB_OFFLINE="1")[0].split()[1]
        found[name] = (Path(path) / "model.safetensors").read_text()

    assert ["v1.0", "refs/pr/3", "main"] == list(found.values())


def test_not_enough_disk_space_is_reported(hub: ModelHub, user: User) -> None:
    """It is reported before anything large is fetched, or when a write fails."""
    content = bytes(2 * CHUNK)
    hub.models["acme/large"] = {"main": files(*SMALL) | {"model.safetensors": content}}
    small = "shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(0, 0, 10**7)"
    before, _ = user.locate("acme/large", small)
    sent = hub.fetched()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({CHUNK}, {CHUNK}))"
    during, _ = user.locate("acme/large", limit)

    assert "acme/large: 0.0 GB remain to be downloaded, but the disk of" in before
    assert ["config.json"] == sent
    assert f"acme/large: cannot be downloaded to {user.home}/hub: File too large" == during


def test_export_from_the_hub(hub: ModelHub, user: User, tmp_path: Path) -> None:
    """A real checkpoint in two shards becomes a model folder; progress is shown in bytes."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in tiny_checkpoint("qwen2").iterdir():
        if path.name in (*SMALL, "generation_config.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    weights = sorted(load_file(tiny_checkpoint("qwen2") / "model.safetensors").items())
    for shard, part in zip(SHARDS, (weights[::2], weights[1::2]), strict=True):
        save_file(dict(part), folder / shard, {"format": "pt"})
    names = {name: SHARDS[i % 2] for i, (name, _) in enumerate(weights)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    hub.add("acme/tiny", folder)
    out = tmp_path / "models" / "tiny"
    script = "from generator_svc.export import *; print(export_model({!r}, {!r}, {}, {}))"
    options = 'ExportOptions("fp32"), lambda *progress: print(*progress)'
    command = script.format("acme/tiny", str(out), *options.split(", ", 1))
    process = user.start("-c", command)
    output, errors = process.communicate(timeout=600)

    assert (0, str(out)) == (process.returncode, output.splitlines()[-1]), errors
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert f"fetching {size} {size}\n" in output
    assert ("tiny", "fp32") == (load_model_directory(out).id, load_model_directory(out).precision)
    assert "acme/tiny" == json.loads((out / "trivium_export.json").read_text())["source"]


def test_export_command_with_a_hub_name(hub: ModelHub, user: User, tmp_path: Path) -> None:
    """`trivium export owner/name`: refused in one line without a token, exported with one."""
    hub.add("acme/gated", tiny_checkpoint("llama"))
    hub.gated, hub.tokens = {"acme/gated": "hf_secret"}, {"hf_secret"}
    out = tmp_path / "gated"
    arguments = ("export", "acme/gated", "--out", str(out), "--precision", "fp32")
    ended = []
    for environment in ({}, {"HF_TOKEN": "hf_secret"}):
        process = user.start("-m", "trivium.cli", *arguments, **environment)
        _, errors = process.communicate(timeout=600)
        ended.append((process.returncode, errors.splitlines()[-1]))

    refused, made = ended
    assert 1 == refused[0]
    assert refused[1].startswith("trivium export: acme/gated: is gated: request access at ")
    assert (0, f"{out} is ready: trivium up --model {out}") == made
    assert load_model_directory(out).id == "gated"
