"""An OpenTelemetry collector, over gRPC or HTTP, that keeps the spans it receives."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Received:
    """A span and the service that sent it."""

    service: str
    resource: dict[str, Any]
    span: trace_pb2.Span

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def id(self) -> str:
        return self.span.span_id.hex()

    @property
    def parent(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def trace(self) -> str:
        return self.span.trace_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        return _plain(self.span.attributes)

    @property
    def events(self) -> list[str]:
        return [event.name for event in self.span.events]

    @property
    def began(self) -> int:
        return self.span.start_time_unix_nano

    @property
    def ended(self) -> int:
        return self.span.end_time_unix_nano


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector at `endpoint`, with the spans it has received."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Received] = []

    def Export(self, request: Any, context: Any) -> Any:
        for of_resource in request.resource_spans:
            resource = _plain(of_resource.resource.attributes)
            self.spans += [
                Received(resource["service.name"], resource, span)
                for scope in of_resource.scope_spans
                for span in scope.spans
            ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace: str) -> list[Received]:
        """The spans of a trace, ordered by start time."""
        found = [span for span in list(self.spans) if span.trace == trace]
        return sorted(found, key=lambda span: span.began)


@contextmanager
def over_grpc() -> Iterator[Collector]:
    """A collector that speaks gRPC."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    yield collector
    server.stop(None).wait()


@contextmanager
def over_http() -> Iterator[Collector]:
    """A collector that speaks HTTP with protobuf."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            answer = collector.Export(request, None).SerializeToString()
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield collector
    server.shutdown()
    server.server_close()
    thread.join()


def _plain(attributes: Any) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)
