"""The embedded model, exported once into the cache, with `trivium up` and the examples."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from generator_svc.export.cached import find_embedded
from tests.examples import example_runs
from tests.ports import free_ports
from trivium.embedded_model import EMBEDDED_MODEL

pytestmark = pytest.mark.embedded

CAPITAL = "The capital of France is Paris."


@dataclass
class Up:
    """A running `trivium up`: its process, its output until it was ready, its addresses."""

    process: subprocess.Popen[str]
    banner: str
    url: str
    grpc: str
    metrics: str

    def reprefill_nanoseconds(self) -> int:
        """The time the generator has spent re-prefilling answers."""
        text = httpx.get(self.metrics, trust_env=False).text
        found = re.search(r'overhead_nanoseconds_total\{[^}]*reason="reprefill"\} (\S+)', text)
        return int(float(found[1])) if found else 0

    def wait(self) -> int:
        """The exit code, once it has ended."""
        self.process.communicate(timeout=60)
        return self.process.returncode

    def children(self) -> list[int]:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(pid) for pid in listed.stdout.split()]


def start_up() -> Up:
    """Starts `trivium up` on free ports and reads its output up to the end of the banner."""
    names = ("port", "tokenizer-port", "tokenizer-metrics-port", "generator-port")
    ports = free_ports(5)
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=False)]
    command = [sys.executable, "-m", "trivium.cli", "up", *options]
    command.append(f"--generator-metrics-port={ports[4]}")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    banner = ""
    for line in process.stdout:
        banner += line
        if line.startswith("print("):
            break
    url, metrics = (f"http://127.0.0.1:{port}" for port in (ports[0], ports[4]))
    return Up(process, banner, url, f"127.0.0.1:{ports[1]}", f"{metrics}/metrics")


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    running = start_up()
    yield running
    running.process.kill()
    running.wait()


def ask(url: str, **fields: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        return client.chat.completions.create(
            **{"model": EMBEDDED_MODEL, "messages": messages, **fields}
        )


@pytest.mark.timeout(600)
def test_the_banner_describes_the_server_and_its_curl_works(up: Up) -> None:
    """It shows model, provider, memory and addresses; its command can be pasted into a shell."""
    embedded = find_embedded("cpu")
    assert embedded is not None
    precision = embedded.manifest["precision"]
    for word in (EMBEDDED_MODEL, "ExecutionProvider", precision, "4,096 tokens", "slots", "gRPC"):
        assert word in up.banner
    command = re.search(r"^curl .*$", up.banner, re.M)
    assert command is not None
    answer = subprocess.run(command[0], shell=True, capture_output=True, text=True).stdout

    assert CAPITAL in answer
    assert '"gpu_seconds":' in answer


def test_concurrent_requests_get_the_same_answer(up: Up) -> None:
    """Sixteen concurrent requests get the same answer as a single one."""
    alone = ask(up.url)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(lambda _: ask(up.url), range(16)))

    assert CAPITAL == alone.choices[0].message.content
    assert {CAPITAL} == {answer.choices[0].message.content for answer in crowd}
    assert all(answer.usage.gpu_seconds > 0 for answer in crowd)


def test_the_next_turn_reuses_the_cached_answer(up: Up) -> None:
    """Only the new tokens are computed."""
    question: list[Any] = [{"role": "user", "content": "Name a river in Africa."}]
    before = up.reprefill_nanoseconds()
    first = ask(up.url, messages=question, max_tokens=24)
    spent = [before, up.reprefill_nanoseconds()]
    while spent[-1] == before or spent[-1] != spent[-2]:
        time.sleep(1.0)
        spent.append(up.reprefill_nanoseconds())
    said = {"role": "assistant", "content": first.choices[0].message.content}
    more = {"role": "user", "content": "And one in Asia?"}
    second = ask(up.url, messages=[*question, said, more], max_tokens=4)

    used, reused = first.usage, second.usage.prompt_tokens_details.cached_tokens
    assert reused >= used.prompt_tokens + used.completion_tokens - 1


def test_allowed_tools_reuse_the_cached_prompt(up: Up) -> None:
    """Which tools may be called can change with every request without computing the prompt anew."""
    names = ("get_weather", "get_time")
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}} for name in names
    ]
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answers = []
    for tool in (*tools, *tools):
        allowed = {"mode": "required", "tools": [tool]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        answers.append(ask(up.url, messages=question, tools=tools, tool_choice=choice))
    called = [answer.choices[0].message.tool_calls[0].function.name for answer in answers]
    [size] = {answer.usage.prompt_tokens for answer in answers}
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers[1:]]

    assert [*names, *names] == called
    assert min(cached) > 0.9 * size


def test_a_seeded_answer_is_the_same_under_load(up: Up) -> None:
    """Sampled answers depend on the seed, and not on other requests."""
    sampled: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24}
    alone = [ask(up.url, seed=seed, **sampled) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(lambda n: ask(up.url, seed=n % 4, **sampled), range(12)))

    texts = [answer.choices[0].message.content for answer in alone]
    assert texts * 3 == [answer.choices[0].message.content for answer in crowd]
    assert len(set(texts)) == 4


async def test_the_examples_run(up: Up) -> None:
    """They are Python and Node over gRPC, and curl and OpenAI's client over REST."""
    outputs = [
        await example_runs.run_python_grpc(up.grpc),
        await example_runs.run_node_grpc(up.grpc),
        await example_runs.run_python_openai(up.url),
        await example_runs.run_curl(up.url, EMBEDDED_MODEL),
    ]

    assert all("Paris" in output for output in outputs), outputs


def test_bench_and_doctor_run(up: Up) -> None:
    """The load generator measures it; the doctor finds no problem, and the CPU provider."""
    trivium = [sys.executable, "-m", "trivium.cli"]
    load = ["--clients=1,4", "--requests=4", "--output-tokens=8", "--prompt-tokens=30"]
    bench = subprocess.run(
        [*trivium, "bench", "--url", up.url, *load], capture_output=True, text=True
    )
    doctor = subprocess.run([*trivium, "doctor"], capture_output=True, text=True)

    assert 0 == bench.returncode, bench.stdout + bench.stderr
    assert 0 == doctor.returncode, doctor.stdout + doctor.stderr
    assert "CPUExecutionProvider" in doctor.stdout


def test_ctrl_c_leaves_no_process() -> None:
    """Ctrl-C ends all four processes, and the exit code is 0."""
    running = start_up()
    children = running.children()
    running.process.send_signal(signal.SIGINT)

    assert 0 == running.wait()
    assert len(children) >= 3
    assert not any(is_running(pid) for pid in children)


def test_a_dead_process_ends_the_others() -> None:
    """After kill -9 of one of the three the others stop, and the exit code is not 0."""
    running = start_up()
    children = running.children()
    os.kill(children[0], signal.SIGKILL)

    assert running.wait() != 0
    assert not any(is_running(pid) for pid in children)
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url)
