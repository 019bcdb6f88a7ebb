"""The HTTP server for a process's metrics and its health probes. Never over TLS."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from typing import Any

from prometheus_client import start_http_server
from prometheus_client.registry import CollectorRegistry

from trivium.wire.errors import ServiceError
from trivium.wire.listening import bind_error_message

_ANSWER_SECONDS = 5.0  # time for a busy event loop to answer

Check = Callable[[], Awaitable[None]]


def serve_metrics(port: int, host: str, registry: CollectorRegistry, check_ready: Check) -> None:
    """Starts the server, unless `port` is 0; raises OSError if the port is in use.

    /healthz runs `check_ready` on the current event loop: 200, or 503 with the message of the
    ServiceError that it raises. /livez returns 200 while that loop is responsive. Any other path
    returns the metrics, in Prometheus' text format whatever the scraper accepts: in OpenMetrics,
    which Prometheus 2 asks for, prometheus_client turns `vllm:` into `vllm_`.
    """
    if not port:
        return
    loop = asyncio.get_running_loop()
    checks = {"/healthz": check_ready, "/livez": _nothing}
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise OSError(f"METRICS_PORT: {bind_error_message(host, port, error)}") from error
    metrics = server.get_app()
    assert metrics is not None, "A metrics server without an application. This is a bug."

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        check = checks.get(environ["PATH_INFO"])
        if check is None:
            return metrics(environ | {"HTTP_ACCEPT": ""}, start_response)
        fault = _fault(loop, check)
        status = "503 Service Unavailable" if fault else "200 OK"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{fault or 'ok'}\n".encode()]

    server.set_app(answer)


def _fault(loop: asyncio.AbstractEventLoop, check: Check) -> str:
    """Why the check fails; empty if it passes. Called in the server's thread."""

    async def checked() -> str:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await check()
        except ServiceError as error:
            return error.message
        return ""

    work = checked()
    try:
        return asyncio.run_coroutine_threadsafe(work, loop).result(_ANSWER_SECONDS)
    except TimeoutError:
        return "The process does not respond."
    except (RuntimeError, CancelledError):  # the loop is closed, or about to be
        work.close()
        return "The process has ended."


async def _nothing() -> None:
    pass
