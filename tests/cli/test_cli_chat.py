"""`trivium chat` in a process of its own, against a scripted server."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from typer.testing import CliRunner

from tests.certificates import Files
from tests.cli.openai_script import ScriptedServer
from trivium.cli.main import app


@pytest.fixture
def chat(scripted: ScriptedServer) -> Iterator[subprocess.Popen[str]]:
    """The command, connected by pipes."""
    command = [sys.executable, "-u", "-m", "trivium.cli", "chat", "--url", scripted.url]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        yield process
        process.kill()


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """Output up to and including `wanted`."""
    assert process.stdout is not None
    text = ""
    while not text.endswith(wanted):
        character = process.stdout.read(1)
        assert character, f"ended after {text!r}"
        text += character
    return text


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def test_answers_and_remembers(chat: subprocess.Popen[str], scripted: ScriptedServer) -> None:
    """An answer is shown with its cost, and the next request has the conversation so far."""
    say(chat, "hello")
    shown = read_until(chat, "]\n")
    say(chat, "again")
    read_until(chat, "]\n")
    say(chat, "/exit")

    assert chat.wait() == 0
    assert "word word word word " in shown
    assert "[4 tokens, " in shown
    assert " tokens/s, first after " in shown
    assert "0.250 gpu_seconds]" in shown
    assert ["user", "assistant", "user"] == [m["role"] for m in scripted.bodies[1]["messages"]]


def test_ctrl_c_cancels_the_answer_only(
    chat: subprocess.Popen[str], scripted: ScriptedServer
) -> None:
    """Ctrl-C closes the stream, so that the server stops, and the next question is answered."""
    scripted.tokens_before_silence = 2
    say(chat, "tell me everything")
    read_until(chat, "word word ")
    chat.send_signal(signal.SIGINT)
    shown = read_until(chat, "]\n")
    server_noticed = scripted.cut.wait(60)
    scripted.tokens_before_silence = None
    say(chat, "short please")
    after = read_until(chat, "]\n")
    say(chat, "/exit")

    assert chat.wait() == 0
    assert "[cancelled, " in shown
    assert server_noticed
    assert "word word word word " in after


def test_new_starts_over(chat: subprocess.Popen[str], scripted: ScriptedServer) -> None:
    """/new forgets the conversation."""
    say(chat, "hello")
    read_until(chat, "]\n")
    say(chat, "/new")
    say(chat, "hello")
    read_until(chat, "]\n")

    assert [1, 1] == [len(body["messages"]) for body in scripted.bodies]


def test_a_refusal_does_not_end_the_program(
    chat: subprocess.Popen[str], scripted: ScriptedServer
) -> None:
    """The server's message is shown and the chat goes on, without the refused question."""
    scripted.refusal = (429, "the queue is full")
    say(chat, "hello")
    shown = read_until(chat, "full")
    scripted.refusal = None
    say(chat, "hello")
    read_until(chat, "]\n")

    assert "HTTP 429: the queue is full" in shown
    assert len(scripted.bodies[1]["messages"]) == 1


def test_an_answer_that_ends_early_is_not_shown_as_whole(
    chat: subprocess.Popen[str], scripted: ScriptedServer
) -> None:
    """As when a proxy has lost the server behind it: a line says so, and the chat goes on."""
    scripted.stops_short = True
    say(chat, "hello")
    shown = read_until(chat, "[DONE]")
    scripted.stops_short = False
    say(chat, "hello")
    read_until(chat, "]\n")

    assert "word word " in shown
    assert "the server ended the stream without [DONE]" in shown
    assert len(scripted.bodies[1]["messages"]) == 1


@pytest.mark.parametrize("command", ["chat", "bench"])
@pytest.mark.parametrize("models", ["<html>", "[]", "{}", '{"data": [{}]}', '{"data": 5}'])
def test_another_server_at_the_address(scripted: ScriptedServer, command: str, models: str) -> None:
    """A web page or any other JSON than the list of models is refused in one line."""
    scripted.models = models
    result = CliRunner().invoke(app, [command, "--url", scripted.url])

    assert 1 == result.exit_code
    assert result.stderr.startswith(f"trivium {command}: {scripted.url}")
    assert "the response is not one of OpenAI's API" in result.stderr
    assert 1 == len(result.stderr.splitlines())


@pytest.mark.parametrize("command", ["chat", "bench"])
def test_an_invalid_url_is_refused(command: str) -> None:
    """In one line."""
    result = CliRunner().invoke(app, [command, "--url", "http://[::1"])

    assert 1 == result.exit_code
    assert result.stderr.startswith(f"trivium {command}: http://[::1")
    assert 1 == len(result.stderr.splitlines())


def test_ctrl_d_leaves(chat: subprocess.Popen[str]) -> None:
    """The end of the input ends the program."""
    read_until(chat, "> ")
    assert chat.stdin is not None
    chat.stdin.close()

    assert chat.wait() == 0


@pytest.mark.parametrize("command", ["chat", "bench"])
def test_invalid_ca_file_is_refused(command: str, tmp_path: Path) -> None:
    """A missing or invalid CA file is refused in one line that names it, before any request."""
    empty = tmp_path / "empty.crt"
    empty.touch()
    for path in (empty, tmp_path / "gone.crt"):
        result = CliRunner().invoke(app, [command, "--ca-file", str(path)])

        assert 2 == result.exit_code
        assert f"--ca-file {path}: " in result.output


@pytest.mark.parametrize("command", ["chat", "bench"])
def test_invalid_client_certificate_is_refused(command: str, tmp_path: Path) -> None:
    """A wrong certificate is refused, by name, before any request; so is a key without one."""
    ours, others = (Files(tmp_path / name).write(trustme.CA()) for name in ("ours", "others"))
    empty = tmp_path / "empty.crt"
    empty.touch()
    certificate = ["--cert-file", str(ours.certificate)]
    for arguments, message in (
        (["--cert-file", str(empty)], f"--cert-file {empty}: "),
        ([*certificate, "--key-file", str(others.key)], f" with --key-file {others.key}: "),
        (["--key-file", str(ours.key)], f"--key-file {ours.key} requires --cert-file"),
    ):
        result = CliRunner().invoke(app, [command, *arguments])

        assert 2 == result.exit_code
        assert message in result.output
