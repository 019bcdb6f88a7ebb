"""Spans of requests that do not go as planned."""

import itertools
from collections.abc import Iterator

import httpx
import pytest

from tests.pipeline.collector import Collector, Received, over_grpc
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend
from trivium.wire import tracing
from trivium.wire.errors import ServiceError

REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/chat/completions"
TRACES = (f"{number:032x}" for number in itertools.count(1))


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """The spans that this process exports."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with over_grpc() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        with tracing.export_spans("rest_facade", "rest_facade-2"):
            yield collector


async def traced(client: httpx.AsyncClient, exported: Collector, **fields: object) -> Received:
    """The span of a chat request with these fields."""
    trace = next(TRACES)
    headers = {"traceparent": f"00-{trace}-{'b' * 16}-01"}
    await client.post(URL, json=REQUEST | fields, headers=headers)
    while True:
        for span in exported.of_trace(trace):
            if span.name == f"POST {URL}":
                return span
        await client.get("/health/live")


async def test_a_server_error_marks_the_span_as_error(
    exported: Collector, client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """A retry is an event; the span's error is the code that the client got."""
    backend.script = [ServiceError("draining", "Not here.")]
    span = await traced(client, exported)

    assert ["retry"] == span.events
    assert ("draining", 503) == (
        span.attributes["error.type"],
        span.attributes["http.response.status_code"],
    )
    assert 2 == span.span.status.code
    assert "rest_facade-2" == span.resource["service.instance.id"]


async def test_a_client_error_does_not_mark_the_span_as_error(
    exported: Collector, client: httpx.AsyncClient
) -> None:
    """The code says that it is the caller's error."""
    span = await traced(client, exported, n="one")

    assert "invalid_type" == span.attributes["error.type"]
    assert 0 == span.span.status.code


async def test_an_interrupted_stream_marks_the_span_as_error(
    exported: Collector, client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """The span is an error though the HTTP status was 200."""
    backend.script = [*backend.script[:2], ServiceError("backend_unavailable", "Gone.")]
    span = await traced(client, exported, stream=True)

    assert "backend_unavailable" == span.attributes["error.type"]
    assert (2, 200) == (span.span.status.code, span.attributes["http.response.status_code"])
