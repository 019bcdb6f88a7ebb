"""`trivium bench` against a scripted server: what it sends, counts and reports."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.cli.openai_script import ScriptedServer
from trivium.cli.answer import Answer, AnswerFailed, api_root
from trivium.cli.load import percentiles
from trivium.cli.main import app
from trivium.cli.random_prompts import Prompts


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.output


def test_tokens_are_counted_from_the_servers_usage(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """Each number of clients sends its requests, and the report sums the usage of the answers."""
    report = tmp_path / "report.json"
    options = ("--clients", "1,3", "--requests", "2", "--output-tokens", "5")
    status, output = run("--url", scripted.url, *options, "--json", str(report))

    one, three = json.loads(report.read_text())["levels"]
    assert status == 0
    assert "scripted at" in output
    assert (1, 2, 0) == (one["clients"], one["requests"], one["failures"])
    assert (3, 6, 0) == (three["clients"], three["requests"], three["failures"])
    assert (10, 30) == (one["completion_tokens"], three["completion_tokens"])
    assert (0.5, 1.5) == (one["gpu_seconds"], three["gpu_seconds"])
    assert {"p50", "p95", "p99"} == set(three["time_to_first_token"])
    assert three["output_tokens_per_second"] > 0


def test_prompts_differ_and_have_the_requested_length(scripted: ScriptedServer) -> None:
    """No prompt is repeated, each has about the requested length, and no answer ends early."""
    status, _ = run("--url", scripted.url, "--clients", "4", "--prompt-tokens", "100")

    streamed = [body for body in scripted.bodies if body["stream"]]
    prompts = [body["messages"][0]["content"] for body in streamed]
    assert status == 0
    assert len(prompts) == len({tuple(prompt.split()[:6]) for prompt in prompts}) == 16
    assert {45} == {len(prompt.split()) for prompt in prompts}  # 10 + 2 tokens a word
    assert all(body["ignore_eos"] and body["max_tokens"] == 64 for body in streamed)
    assert all(body["stream_options"] == {"include_usage": True} for body in streamed)


def test_refusal_shows_the_servers_message(scripted: ScriptedServer) -> None:
    """If the server refuses, its message is shown and the exit status is not 0."""
    scripted.refusal = (404, "no model called scripted")
    status, output = run("--url", scripted.url)

    assert status == 1
    assert "HTTP 404: no model called scripted" in output


def test_a_broken_stream_is_a_failure(scripted: ScriptedServer, tmp_path: Path) -> None:
    """An answer that ends in an error event counts as failed, and its message is shown."""
    scripted.breaks_off = True
    report = tmp_path / "report.json"
    status, output = run("--url", scripted.url, "--clients", "2", "--json", str(report))

    assert status == 1
    assert "the generator is gone" in output
    assert json.loads(report.read_text())["levels"][0]["failures"] == 8


@pytest.mark.parametrize("clients", ["", "0", "one", "1,,2"])
def test_invalid_client_numbers_are_refused(clients: str) -> None:
    """Invalid numbers of clients are refused before anything is sent."""
    status, output = run("--clients", clients)

    assert status == 2
    assert "--clients" in output


def test_unwritable_json_file_is_refused(scripted: ScriptedServer, tmp_path: Path) -> None:
    """A file that cannot be written is refused in one line, before anything is sent."""
    report = tmp_path / "nowhere" / "report.json"
    status, output = run("--url", scripted.url, "--json", str(report))

    assert status == 2
    assert output == f"trivium bench: --json {report}: No such file or directory\n"
    assert [] == scripted.bodies


def test_no_server_at_the_address(unused_tcp_port: int) -> None:
    """If no server listens, the address is named and the exit status is not 0."""
    status, output = run("--url", f"http://127.0.0.1:{unused_tcp_port}")

    assert status == 1
    assert str(unused_tcp_port) in output


def test_percentiles_interpolate() -> None:
    """As in NumPy; None if there are no values."""
    values = [float(value) for value in range(101)]

    assert {"p50": 50.0, "p95": 95.0, "p99": 99.0} == percentiles(values)
    assert percentiles([]) is None
    assert float(np.percentile([1.0, 2.0], 50)) == (percentiles([1.0, 2.0]) or {})["p50"]


def test_same_seed_draws_the_same_prompts() -> None:
    """The same seed draws the same prompts, another seed different ones."""
    draws = [Prompts(seed).draw(20) for seed in (1, 1, 2)]

    assert draws[0] == draws[1] != draws[2]


def test_times_of_an_answer() -> None:
    """Time to first token counts from the request; gaps are between chunks with text."""
    answer = Answer(began=10.0)
    for now, content in ((10.5, ""), (11.0, "a"), (11.25, "b"), (12.0, "c")):
        chunk = {"choices": [{"index": 0, "delta": {"content": content}}]}
        answer.push(f"data: {json.dumps(chunk)}\n\n".encode(), now)

    assert answer.first_token_seconds == 1.0
    assert [0.25, 0.75] == answer.gaps
    assert answer.tokens_per_second == 2.0
    assert ("abc", 3, False) == (answer.text, answer.completion_tokens, answer.complete)


def test_an_error_event_ends_an_answer() -> None:
    """An error event in the stream is raised with the server's message."""
    with pytest.raises(AnswerFailed, match="too late"):
        Answer(began=0).push(b'data: {"error": {"message": "too late"}}\n\n', 1.0)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_urls_with_and_without_v1(url: str) -> None:
    """People paste either form."""
    assert api_root(url) == "http://h:1/v1"
