"""Logs and traces of a request through the three real services."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.pipeline.collector import Collector, Received, over_grpc, over_http
from tests.pipeline.services import Services

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with over_grpc() as collector:
        yield collector


@pytest.fixture(scope="module")
def services(
    collector: Collector, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    names = ("FACADE", "TOKENIZER", "GENERATOR")
    settings = {f"TRIVIUM_{name}_LOG_LEVEL": "debug" for name in names}
    settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with Services(tiny_model, tmp_path_factory.mktemp("services"), **settings) as services:
        yield services


def ask(
    services: Services, request_id: str, content: str, trace: str = TRACE, **fields: Any
) -> httpx.Response:
    """A chat with one message, in a trace."""
    body = {"messages": [{"role": "user", "content": content}], "model": services.model, **fields}
    headers = {"x-request-id": request_id, "traceparent": f"00-{trace}-{PARENT}-01"}
    url = f"{services.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60)


def lines(services: Services, stage: str, request_id: str) -> list[dict[str, Any]]:
    """A request's log lines in one stage about how a call ended."""
    found = [json.loads(line) for line in services.log(stage).splitlines()]
    return [one for one in found if one["request_id"] == request_id and "seconds" in one]


def test_every_stage_logs_the_outcome_of_a_call(services: Services) -> None:
    """Each logs one line with the request's id, its trace, route or method, and the outcome."""
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
    """The stage that refuses logs it; later stages never get the request."""
    ask(services, "long-1", "Once upon a time " * 2000)
    services.until(lambda: lines(services, "rest_facade", "long-1"), "nothing is logged")

    assert [400] == [line["status"] for line in lines(services, "rest_facade", "long-1")]
    assert ["context_length_exceeded"] == [
        line["code"] for line in lines(services, "tokenizer_svc", "long-1")
    ]
    assert [] == lines(services, "generator_svc", "long-1")


def spans_of(
    services: Services,
    collector: Collector,
    trace: str,
    stages: tuple[str, ...] = ("rest_facade", "tokenizer_svc", "generator_svc"),
) -> list[Received]:
    """A trace's spans, once these stages have sent theirs; a call's own span comes last."""

    def has_arrived(stage: str) -> bool:
        server = trace_pb2.Span.SPAN_KIND_SERVER
        spans = collector.of_trace(trace)
        return any(one.service == stage and one.span.kind == server for one in spans)

    services.until(lambda: all(map(has_arrived, stages)), f"missing spans of {trace}")
    return collector.of_trace(trace)


def tree(spans: list[Received]) -> dict[tuple[str, str], str]:
    """By service and name, each span's parent's name."""
    names = {span.id: span.name for span in spans} | {PARENT: "caller"}
    return {(span.service, span.name): names[span.parent] for span in spans}


def test_a_request_is_one_trace_through_all_stages(
    services: Services, collector: Collector
) -> None:
    """Each stage's span is a child of the previous one's, with its parts as children."""
    trace = "1" * 32
    answer = ask(services, "traced-1", "Once upon a time", trace, max_tokens=8, temperature=0.5)
    spans = spans_of(services, collector, trace)

    chat, generate = f"chat {services.model}", f"generate {services.model}"
    post = "POST /v1/chat/completions"
    assert {
        ("rest_facade", post): "caller",
        ("rest_facade", "receive"): post,
        ("rest_facade", "send"): post,
        ("tokenizer_svc", chat): post,
        ("tokenizer_svc", "render"): chat,
        ("tokenizer_svc", "encode"): chat,
        ("tokenizer_svc", "detokenize"): chat,
        ("generator_svc", generate): chat,
        ("generator_svc", "queue"): generate,
        ("generator_svc", "prefill"): generate,
        ("generator_svc", "decode"): generate,
    } == tree(spans)
    by_name = {span.name: span for span in spans}
    for name, one in by_name.items():
        if name != post:
            parent = next(span for span in spans if span.id == one.parent)
            assert parent.began <= one.began <= one.ended <= parent.ended + 5_000_000, name
    order = [by_name[name] for name in ("render", "encode", "queue", "prefill", "decode")]
    assert all(one.ended <= after.began + 5_000_000 for one, after in itertools.pairwise(order))
    assert 200 == by_name[post].attributes["http.response.status_code"]
    assert 200 == answer.status_code


def test_spans_have_genai_attributes(services: Services, collector: Collector) -> None:
    """Attributes follow the GenAI conventions; the first token is an event where it arises."""
    trace = "2" * 32
    fields = {"max_tokens": 8, "temperature": 0.5, "seed": 7, "n": 2, "ignore_eos": True}
    usage = ask(services, "traced-2", "Once upon", trace, **fields).json()["usage"]
    spans = spans_of(services, collector, trace)
    chat = next(span for span in spans if span.name.startswith("chat "))
    generate = next(span for span in spans if span.name.startswith("generate "))

    wanted = {
        "rpc.method": "trivium.chat.v1.ChatService/CreateChatCompletion",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "trivium",
        "gen_ai.request.model": services.model,
        "gen_ai.response.model": services.model,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 16,
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "trivium.gpu_seconds": usage["gpu_seconds"],
    }
    assert wanted == {name: chat.attributes[name] for name in wanted}
    assert "gen_ai.request.stream" not in chat.attributes
    assert 0 < chat.attributes["gen_ai.response.time_to_first_chunk"] < 60
    assert ["first_token"] == chat.events == generate.events
    assert 16 == generate.attributes["gen_ai.usage.output_tokens"]
    assert "Once upon" not in str(spans)
    assert {"trivium"} == {span.resource["service.namespace"] for span in spans}


def test_streams_and_refusals_have_traces(services: Services, collector: Collector) -> None:
    """A stream's first text is an event; a refusal has its code, and is not an error of ours."""
    with httpx.stream(
        "POST",
        f"{services.url}/v1/chat/completions",
        json={
            "messages": [{"role": "user", "content": "Hello"}],
            "model": services.model,
            "max_tokens": 5,
            "stream": True,
        },
        headers={"traceparent": f"00-{'3' * 32}-{PARENT}-01"},
    ) as stream:
        stream.read()
    ask(services, "traced-4", "Once upon a time " * 2000, "4" * 32)
    streamed = spans_of(services, collector, "3" * 32)
    refused = spans_of(services, collector, "4" * 32, ("rest_facade", "tokenizer_svc"))

    [post] = (span for span in streamed if span.name.startswith("POST"))
    assert ["first_token"] == post.events
    [chat] = (span for span in streamed if span.name.startswith("chat"))
    assert chat.attributes["gen_ai.request.stream"] is True
    for span in refused:
        if span.name.startswith(("POST", "chat")):
            assert "context_length_exceeded" == span.attributes["error.type"]
            assert 0 == span.span.status.code


def test_a_callers_decision_not_to_sample_is_respected(
    services: Services, collector: Collector
) -> None:
    """No stage records a span of it, but logs still have its trace id."""
    trace = "5" * 32
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": services.model}
    headers = {"x-request-id": "unsampled", "traceparent": f"00-{trace}-{PARENT}-00"}
    url = f"{services.url}/v1/chat/completions"
    httpx.post(url, json=body | {"max_tokens": 2}, headers=headers)
    ask(services, "after", "Hi", "6" * 32, max_tokens=2)
    spans_of(services, collector, "6" * 32)

    assert [] == collector.of_trace(trace)
    [line] = lines(services, "generator_svc", "unsampled")
    assert trace == line["trace_id"]


def test_a_request_without_traceparent_starts_a_trace(
    services: Services, collector: Collector
) -> None:
    """Each request has its own trace; health checks, metrics and calls between stages have none."""
    httpx.post(
        f"{services.url}/v1/completions",
        json={"prompt": "Hi", "model": services.model, "max_tokens": 2},
        headers={"x-request-id": "begun"},
    )
    services.until(lambda: lines(services, "rest_facade", "begun"), "nothing is logged")
    [line] = lines(services, "rest_facade", "begun")
    spans = spans_of(services, collector, line["trace_id"])

    assert {"rest_facade", "tokenizer_svc", "generator_svc"} == {span.service for span in spans}
    assert "" == next(span for span in spans if span.name.startswith("POST")).parent
    services.health()
    known = ("POST", "chat", "text_completion", "generate", "receive", "send", "render", "encode")
    known += ("queue", "prefill", "decode", "detokenize")
    assert [] == [span.name for span in collector.spans if not span.name.startswith(known)]


def test_remaining_spans_are_exported_on_exit(tiny_model: Path, tmp_path: Path) -> None:
    """On exit a service sends its remaining spans, over HTTP too, without much delay."""
    settings = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "600000",
        "OTEL_SERVICE_NAME": "mine",
    }
    with over_http() as collector:
        settings["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.endpoint
        with Services(tiny_model, tmp_path, **settings) as services:
            ask(services, "last", "Hi", "7" * 32, max_tokens=2)
            assert [] == collector.spans
            for name in ("rest_facade", "tokenizer_svc", "generator_svc"):
                services.terminate(name)
                assert 0 == services.processes[name].wait(60)

        assert {"mine"} == {span.service for span in collector.spans}
        assert {"POST /v1/chat/completions", "detokenize", "decode"} <= {
            span.name for span in collector.of_trace("7" * 32)
        }


def test_an_unreachable_collector_fails_no_request(tiny_model: Path, tmp_path: Path) -> None:
    """Requests are answered, and services stop within seconds."""
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with Services(tiny_model, tmp_path, **settings) as services:
        answer = ask(services, "good", "Hi", max_tokens=2)
        services.terminate("rest_facade")

        assert 0 == services.processes["rest_facade"].wait(60)
        assert 200 == answer.status_code
