"""`trivium up` with the three real services on a tiny model, and every way for it to end."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from typer.testing import CliRunner

from tests.certificates import Files
from tests.cli.children import is_running
from tests.ports import free_ports
from tests.tiny_models import tiny_model_directory
from trivium.cli.main import app
from trivium.cli.providers import why_not

pytestmark = pytest.mark.pipeline

OPTIONS = ("port", "facade-metrics-port", "tokenizer-port", "tokenizer-metrics-port")
GENERATOR_OPTIONS = ("generator-port", "generator-metrics-port")


@pytest.fixture(scope="module")
def tiny_model() -> Path:
    """A folder made by the real exporter."""
    return tiny_model_directory("llama")


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that routes everything through a proxy on a closed port."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three services require API keys."""
    names = ("client", "facade", "tokenizer")
    tables = [
        f'[keys.{name}]\ndigest = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
        f"stage = {str(name != 'client').lower()}\n"
        for name in names
    ]
    (tmp_path / "keys.toml").write_text("".join(tables))
    for stage in ("FACADE", "TOKENIZER", "GENERATOR"):
        monkeypatch.setenv(f"TRIVIUM_{stage}_API_KEYS_FILE", str(tmp_path / "keys.toml"))
    for setting, name in (("FACADE_TOKENIZER", "facade"), ("TOKENIZER_GENERATOR", "tokenizer")):
        (tmp_path / name).write_text(name)
        monkeypatch.setenv(f"TRIVIUM_{setting}_API_KEY_FILE", str(tmp_path / name))


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """An environment in which all services use TLS; returns its files."""
    files = Files(tmp_path / "tls").write(trustme.CA())
    settings = {
        **files.server("TRIVIUM_FACADE_"),
        **files.channel("TRIVIUM_FACADE_TOKENIZER_"),
        **files.server("TRIVIUM_TOKENIZER_", is_mutual=True),
        **files.channel("TRIVIUM_TOKENIZER_GENERATOR_"),
        **files.server("TRIVIUM_GENERATOR_", is_mutual=True),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return files


@pytest.fixture
def up(tiny_model: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, on free ports."""
    names = (*OPTIONS, *GENERATOR_OPTIONS)
    ports = [f"--{name}={port}" for name, port in zip(names, free_ports(6), strict=True)]
    command = [sys.executable, "-m", "trivium.cli", "up", "--model", str(tiny_model), *ports]
    small = {"TRIVIUM_GENERATOR_SLOTS": "4", "TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH": "512"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **small}
    ) as process:
        yield process
        process.kill()


def read_banner(process: subprocess.Popen[str]) -> str:
    """The whole banner, which is printed once the services are ready."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("print("):
            return "".join(lines)
    raise AssertionError(f"ended with {process.wait()} before it was ready")


def children_of(pid: int) -> dict[str, int]:
    """The process ids of the services, by name."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {Path(f"/proc/{child}/cmdline").read_text().split("\0")[2]: int(child) for child in pids}


def test_banner_snippets_work_and_ctrl_c_drains(
    up: subprocess.Popen[str],
) -> None:
    """The banner's curl and openai-python snippets work; SIGINT drains, with exit status 0."""
    text = read_banner(up)
    services = children_of(up.pid)
    curl = re.search(r"^curl .*$", text, re.MULTILINE)
    assert curl is not None
    curled = subprocess.run(curl[0], shell=True, capture_output=True, text=True)
    snippet = text[text.index("from openai") :]
    asked = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    up.send_signal(signal.SIGINT)

    assert up.wait() == 0
    assert {"rest_facade", "tokenizer_svc", "generator_svc"} == set(services)
    assert [] == [name for name, pid in services.items() if is_running(pid)]
    assert '"gpu_seconds":' in curled.stdout
    assert asked.returncode == 0, asked.stderr
    assert "(in a browser)" in text
    assert "CPUExecutionProvider" in text


def test_all_services_use_tls(tls: Files, up: subprocess.Popen[str]) -> None:
    """The banner's snippets work for clients that trust the CA, and our commands take it too."""
    text = read_banner(up)
    url = re.search(r"REST +(https://\S+)/v1", text)
    curl = re.search(r"^curl .*$", text, re.MULTILINE)
    assert url is not None
    assert curl is not None
    # curl prefers the first two.
    others = ("CURL_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE")
    plain = {name: value for name, value in os.environ.items() if name not in others}
    trusting = {**plain, "SSL_CERT_FILE": str(tls.ca)}
    commands = {
        "curl": ["sh", "-c", curl[0]],
        "openai": [sys.executable, "-c", text[text.index("from openai") :]],
        "chat": [sys.executable, "-m", "trivium.cli", "chat", "--url", url[1]],
        "bench": [
            *(sys.executable, "-m", "trivium.cli", "bench", "--url", url[1], "--clients=1"),
            *("--prompt-tokens=8", "--requests=1"),
        ],
    }
    done = {
        name: subprocess.run(command, input="Hello\n", capture_output=True, text=True, env=trusting)
        for name, command in commands.items()
    }
    stranger = subprocess.run(commands["chat"], capture_output=True, text=True, env=plain)
    named = subprocess.run(
        [*commands["chat"], "--ca-file", str(tls.ca)], input="", capture_output=True, text=True
    )
    up.send_signal(signal.SIGINT)

    assert up.wait() == 0
    assert dict.fromkeys(commands, 0) == {n: p.returncode for n, p in done.items()}, done
    assert '"gpu_seconds":' in done["curl"].stdout
    assert "gpu_seconds]" in done["chat"].stdout
    assert 0 == named.returncode, named.stderr
    assert 1 == stranger.returncode
    assert "CERTIFICATE_VERIFY_FAILED" in stranger.stderr
    assert f"certificate {tls.certificate}" in text
    assert "TLS, reflection on" in text


@pytest.mark.parametrize("command", ["chat", "bench"])
def test_commands_send_a_client_certificate(
    tls: Files, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, command: str
) -> None:
    """If the REST port requires one; without it they fail with the connection's error."""
    monkeypatch.setenv("TRIVIUM_FACADE_TLS_CLIENT_CA_FILE", str(tls.ca))
    up: subprocess.Popen[str] = request.getfixturevalue("up")
    url = re.search(r"REST +(https://\S+)/v1", read_banner(up))
    assert url is not None
    small = ["--clients=1", "--prompt-tokens=8", "--requests=1"] if command == "bench" else []
    arguments = [*("--url", url[1], "--ca-file", str(tls.ca)), *small]
    ours = ["--cert-file", str(tls.certificate), "--key-file", str(tls.key)]
    shown, hidden = (
        subprocess.run(
            [sys.executable, "-m", "trivium.cli", command, *arguments, *certificate],
            input="Hello\n",
            capture_output=True,
            text=True,
        )
        for certificate in (ours, [])
    )

    assert 0 == shown.returncode, shown.stderr
    assert ("gpu_seconds]" if command == "chat" else "tokens/s") in shown.stdout
    assert 1 == hidden.returncode
    assert hidden.stderr.startswith(f"trivium {command}: ")


def test_running_stream_finishes_after_sigterm(up: subprocess.Popen[str]) -> None:
    """A stream that is in flight when SIGTERM arrives goes on to its [DONE]."""
    url = re.search(r"REST +(http://\S+)", read_banner(up))
    assert url is not None
    model = httpx.get(f"{url[1]}/models").json()["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{url[1]}/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        up.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]

    assert up.wait() == 0
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"


def test_proxy_in_the_environment_is_not_used(dead_proxy: None, up: subprocess.Popen[str]) -> None:
    """The services reach each other, and our commands reach them, without the proxy."""
    text = read_banner(up)
    url, target = re.search(r"REST +(http://\S+)", text), re.search(r"gRPC +(\S+)", text)
    assert url is not None
    assert target is not None
    host = url[1].removesuffix("/v1")
    for arguments in (
        ["trivium.cli.probe", f"{host}/health"],
        ["trivium.cli.probe", f"grpc://{target[1]}/trivium.chat.v1.ChatService"],
        ["trivium.cli", "chat", "--url", host],
        ["trivium.cli", "bench", "--url", host, "--clients=1", "--prompt-tokens=8", "--requests=1"],
    ):
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, input="Hello\n", capture_output=True, text=True)

        assert 0 == done.returncode, f"{arguments}: {done.stdout}{done.stderr}"
        assert "refused" not in done.stdout + done.stderr


def test_doctor_uses_no_proxy(dead_proxy: None, tiny_model: Path) -> None:
    """Its smoke test goes directly over loopback as well."""
    result = CliRunner().invoke(app, ["doctor", "--model", str(tiny_model)])

    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output


@pytest.mark.usefixtures("keys")
def test_keys_at_every_stage(up: subprocess.Popen[str]) -> None:
    """The services become ready and answer clients that have a key."""
    url = re.search(r"REST +(http://\S+)", read_banner(up))
    assert url is not None
    message = {"role": "user", "content": "Hi"}
    body = {"model": "tiny-llama-fp32", "messages": [message], "max_tokens": 2}
    statuses = [
        httpx.post(f"{url[1]}/chat/completions", json=body, headers=headers).status_code
        for headers in ({}, {"authorization": "Bearer client"})
    ]

    assert [401, 200] == statuses


@pytest.mark.parametrize("victim", ["generator_svc", "tokenizer_svc", "rest_facade"])
def test_killed_service_stops_the_others(up: subprocess.Popen[str], victim: str) -> None:
    """Whichever of the three dies, the other two are stopped and the status is not 0."""
    read_banner(up)
    services = children_of(up.pid)
    os.kill(services[victim], signal.SIGKILL)

    assert up.wait() == 1
    assert [] == [name for name, pid in services.items() if is_running(pid)]


def test_killed_supervisor_stops_the_services(up: subprocess.Popen[str]) -> None:
    """`kill -9` of `trivium up` leaves no service behind."""
    read_banner(up)
    services = children_of(up.pid)
    up.kill()
    up.wait()
    while any(is_running(pid) for pid in services.values()):
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("TRIVIUM_GENERATOR_SLOTS", ""),  # before any service is started
        ("TRIVIUM_TOKENIZER_MAX_CONNECTION_AGE_SECONDS", "tokenizer_svc exited with status 2"),
    ],
)
def test_refused_setting_is_named(tiny_model: Path, setting: str, message: str) -> None:
    """The refused setting is named, and `trivium up` exits with status 2."""
    names = (*OPTIONS, *GENERATOR_OPTIONS)
    ports = [f"--{name}={port}" for name, port in zip(names, free_ports(6), strict=True)]
    command = [sys.executable, "-m", "trivium.cli", "up", "--model", str(tiny_model), *ports]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, setting: "many"}
    )

    assert done.returncode == 2
    assert f"{setting}: " in done.stderr
    assert message in done.stderr
    assert bool(message) == ("trivium up: " in done.stderr)


def test_the_doctor_shows_gpus(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Card, driver and memory as nvidia-smi reports them; missing CUDA libraries are named, and
    are a failure if CUDA was requested."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.65, 142000 MiB, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("trivium.cuda_libraries.LIBRARIES", {"libnone.so.1": "nvidia-none"})
    command = ["doctor", "--model", str(tiny_model), "--device", "cuda"]
    why_not.cache_clear()  # it may have cached the result for the real libraries
    result = CliRunner().invoke(app, command)
    why_not.cache_clear()
    card = "NVIDIA H200, driver 580.65, 142000 MiB of 143771 MiB free"

    assert re.search(f"ok +GPU +{card}", result.output)
    if "works" not in result.output.partition("CUDAExecutionProvider")[2].partition("\n")[0]:
        assert re.search(
            r"FAIL +CUDAExecutionProvider +.*libnone\.so\.1 \(nvidia-none\)", result.output
        )
        assert result.exit_code == 1


@pytest.mark.usefixtures("keys")
def test_doctor_generates_five_tokens(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor starts the pipeline on free ports, gets its tokens and finds nothing wrong,
    whatever keys and models the environment configures; it writes no usage records."""
    usage = tmp_path / "usage"
    monkeypatch.setenv("TRIVIUM_GENERATOR_USAGE_LOG", str(usage))
    monkeypatch.setenv("TRIVIUM_FACADE_USAGE_LOG", str(usage))
    models = [{"model_directory": str(tmp_path / name)} for name in ("one", "another")]
    monkeypatch.setenv("TRIVIUM_TOKENIZER_MODELS", json.dumps(models))
    result = CliRunner().invoke(app, ["doctor", "--model", str(tiny_model)])

    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    assert re.search(r"ok +CPUExecutionProvider +works", result.output)
    assert re.search(r"ok +smoke test .* gpu_seconds", result.output)
    assert not usage.exists()


def test_doctor_accepts_a_base_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a chat template it completes text; it is found by name as `trivium up` finds it."""
    folder = shutil.copytree(tiny_model, tmp_path / "models" / "base")
    for name in ("chat_template.jinja", "trivium_export.json"):
        (folder / name).unlink()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--model", "base"])

    assert result.exit_code == 0, result.output
    assert re.search(r"ok +smoke test .* gpu_seconds", result.output)
