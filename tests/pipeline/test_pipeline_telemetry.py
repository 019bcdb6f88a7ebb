"""What the three real services tell their operators of a request."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pipeline.services import Services

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def services(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    names = ("FACADE", "TOKENIZER", "GENERATOR")
    levels = {f"TRIVIUM_{name}_LOG_LEVEL": "debug" for name in names}
    with Services(tiny_model, tmp_path_factory.mktemp("services"), **levels) as services:
        yield services


def ask(services: Services, request_id: str, content: str, **fields: Any) -> httpx.Response:
    """A chat of one message, in a trace."""
    body = {"messages": [{"role": "user", "content": content}], "model": services.model, **fields}
    headers = {"x-request-id": request_id, "traceparent": f"00-{TRACE}-{PARENT}-01"}
    return httpx.post(f"{services.url}/v1/chat/completions", json=body, headers=headers)


def lines(services: Services, stage: str, request_id: str) -> list[dict[str, Any]]:
    """A request's lines in a stage's log that say how a call ended."""
    found = [json.loads(line) for line in services.log(stage).splitlines()]
    return [one for one in found if one["request_id"] == request_id and "seconds" in one]


def test_every_stage_logs_how_a_call_ended(services: Services) -> None:
    """One access line each, with the request's id, its trace, route or method, and the outcome."""
    ask(services, "good-1", "Hello", max_tokens=3)
    services.until(lambda: lines(services, "rest_facade", "good-1"), "nothing is logged")
    [facade], [tokenizer], [generator] = (
        lines(services, stage, "good-1")
        for stage in ("rest_facade", "tokenizer_svc", "generator_svc")
    )

    assert TRACE == facade["trace_id"] == tokenizer["trace_id"] == generator["trace_id"]
    assert ("POST", "/v1/chat/completions", 200) == (
        facade["method"],
        facade["route"],
        facade["status"],
    )
    assert ("trivium.chat.v1.ChatService/CreateChatCompletion", "ok") == (
        tokenizer["method"],
        tokenizer["code"],
    )
    assert "trivium.generator.v1.GeneratorService/Generate" == generator["method"]
    assert facade["seconds"] > tokenizer["seconds"] > generator["seconds"] > 0


def test_refusals_are_logged_with_their_code(services: Services) -> None:
    """Where it was refused; later stages never hear of it."""
    ask(services, "long-1", "Once upon a time " * 2000)
    services.until(lambda: lines(services, "rest_facade", "long-1"), "nothing is logged")

    assert [400] == [line["status"] for line in lines(services, "rest_facade", "long-1")]
    assert ["context_length_exceeded"] == [
        line["code"] for line in lines(services, "tokenizer_svc", "long-1")
    ]
    assert [] == lines(services, "generator_svc", "long-1")
