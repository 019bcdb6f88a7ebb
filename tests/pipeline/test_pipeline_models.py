"""Two models behind one tokenizer stage, each with its own generator."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.ports import free_port, free_ports
from tests.tiny_models import tiny_model_directory


@pytest.fixture(scope="module")
def two_models() -> Iterator[tuple[str, list[str], subprocess.Popen[str]]]:
    """`trivium up` with two models: its URL, the models' ids and its process."""
    folders = [tiny_model_directory("llama"), tiny_model_directory("qwen2")]
    port, tokenizer, tokenizer_metrics, generator = free_ports(4)
    command = [sys.executable, "-m", "trivium.cli", "up", f"--port={port}"]
    command += [f"--model={folder}" for folder in folders]
    command += [f"--tokenizer-port={tokenizer}", f"--tokenizer-metrics-port={tokenizer_metrics}"]
    command += [f"--generator-port={generator}", "--generator-metrics-port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("print("):
            break
    yield f"http://127.0.0.1:{port}", [folder.name for folder in folders], process
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_each_model_answers_under_its_own_id(
    two_models: tuple[str, list[str], subprocess.Popen[str]],
) -> None:
    """Both models are listed and answer under their own ids, and an unknown one is 404."""
    url, names, _ = two_models
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        # The API is up with the first model; a slower generator is found soon after.
        listed: list[str] = []
        while len(listed) < len(names):
            listed = [model.id for model in client.models.list().data]
        answers = {}
        for name in names:
            answer = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "Once upon a time"}],
                max_tokens=12,
                seed=1,
            )
            assert name == answer.model
            answers[name] = answer.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(
                model="neither", messages=[{"role": "user", "content": "Hello"}]
            )

    assert sorted(names) == sorted(listed)
    assert 2 == len(set(answers.values()))


def test_duplicate_model_ids_are_refused(tmp_path: Path) -> None:
    """Two folders with the same name are refused at startup."""
    folder = tiny_model_directory("llama")
    twin = tmp_path / folder.name
    os.symlink(folder, twin)
    port = free_port()
    models = (f"--model={folder}", f"--model={twin}")
    command = [sys.executable, "-m", "trivium.cli", "up", f"--port={port}", *models]
    refused = subprocess.run(command, capture_output=True, text=True)

    assert 2 == refused.returncode
    assert "same id" in refused.stderr
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
