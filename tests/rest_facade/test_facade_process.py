"""`python -m rest_facade` as a process: how it starts, fails to start, and stops."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header, usage

ROOT = Path(__file__).parents[2]
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
URL = "/v1/chat/completions"


async def spawn(**settings: object) -> asyncio.subprocess.Process:
    """Starts the facade with these settings and no others."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRIVIUM_")}
    ours = {f"TRIVIUM_FACADE_{name.upper()}": str(value) for name, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rest_facade"),
        cwd=ROOT,
        env=clean | ours,
        stderr=asyncio.subprocess.PIPE,
    )


async def refusal(**settings: object) -> tuple[int | None, str]:
    """The exit code and stderr of a facade that does not start."""
    process = await spawn(**settings)
    _, words = await process.communicate()
    return process.returncode, words.decode()


@contextlib.asynccontextmanager
async def running(
    backend: ScriptedBackend, **settings: object
) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """A facade that is ready, and a client for it."""
    port = free_port()
    target = f"127.0.0.1:{backend.port}"
    process = await spawn(port=port, tokenizer_target=target, **settings)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
            while not await _is_ready(client):
                assert process.returncode is None
                await asyncio.sleep(0.05)
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_drain(backend: ScriptedBackend, number: signal.Signals) -> None:
    """On a stop signal, running streams finish, new requests get 503, and the exit code is 0."""
    finish = asyncio.Event()
    backend.script = (header(), delta("He"), finish, delta("llo", finish="STOP"), usage())
    async with running(backend, drain_notice_seconds=0) as (process, client):
        async with client.stream("POST", URL, json=REQUEST) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            process.send_signal(number)
            while (health := await client.get("/health")).status_code == 200:
                pass
            newcomer = await client.post(URL, json=REQUEST)
            live = await client.get("/health/live")
            finish.set()
            text += "".join([part async for part in parts])
        status = await process.wait()

    assert health.json()["error"]["code"] == "draining"
    assert newcomer.status_code == 503
    assert newcomer.json()["error"]["code"] == "draining"
    assert live.status_code == 200
    assert text.endswith("data: [DONE]\n\n")
    assert status == 0


async def test_a_closed_terminal_is_ignored_under_nohup(backend: ScriptedBackend) -> None:
    """The facade, like the other services, keeps serving; another signal stops it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with running(backend, drain_notice_seconds=0) as (process, client):
            process.send_signal(signal.SIGHUP)
            # A signal is handled before the second request, if not before the first.
            health = [(await client.get("/health")).status_code for _ in range(2)]
            process.send_signal(signal.SIGTERM)
            status = await process.wait()
    finally:
        signal.signal(signal.SIGHUP, before)

    assert ([200, 200], 0) == (health, status)


async def test_requests_that_exceed_the_drain_time(backend: ScriptedBackend) -> None:
    """Requests that exceed the drain time get an error, streaming or not; the exit code is 0."""
    backend.script = (header(), delta("He"), None)
    settings = {"drain_notice_seconds": 0, "drain_seconds": 0.2}
    async with running(backend, **settings) as (process, client):
        whole = asyncio.create_task(client.post(URL, json=REQUEST | {"stream": False}))
        await backend.started.wait()
        async with client.stream("POST", URL, json=REQUEST) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            process.send_signal(signal.SIGTERM)
            text += "".join([part async for part in parts])
        refused = await whole
        status = await process.wait()

    assert '"code":"draining"' in text.split("\n\n")[-2]
    assert "[DONE]" not in text
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert backend.cancelled.is_set()
    assert status == 0


async def ends(backend: ScriptedBackend, seconds: float, **settings: object) -> bool:
    """Whether the facade closes a connection within `seconds` of its last answer."""
    async with running(backend, **settings) as (_, client):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b'{"status":"ok"')
        await reader.readuntil(b"}")
        try:
            async with asyncio.timeout(seconds):
                return await reader.read() == b""
        except TimeoutError:
            return False
        finally:
            writer.close()


async def test_idle_connections_are_kept(backend: ScriptedBackend) -> None:
    """By default clients give up idle connections first; the setting changes the time."""
    assert not await ends(backend, seconds=7)
    assert await ends(backend, seconds=60, idle_connection_seconds=1)


async def test_a_new_connection_during_the_drain_gets_503(backend: ScriptedBackend) -> None:
    """A request that arrives just after the notice period gets 503, not a dropped connection."""
    backend.script = (header(), delta("He"), None)
    async with (
        running(backend, drain_notice_seconds=0.2, drain_seconds=600) as (process, client),
        client.stream("POST", URL, json=REQUEST) as answer,
    ):
        parts = answer.aiter_text()
        await anext(parts)
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        process.send_signal(signal.SIGTERM)
        while (await client.get("/v1/models")).status_code != 503:
            pass
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readline()
        writer.close()
        await writer.wait_closed()
        process.send_signal(signal.SIGTERM)
        ending = "".join([part async for part in parts])

    assert '"code":"draining"' in ending
    assert b"HTTP/1.1 503 Service Unavailable\r\n" == head


async def test_a_second_signal_exits_at_once(backend: ScriptedBackend) -> None:
    """Running requests end with an error, whatever notice and drain time are set."""
    backend.script = (header(), delta("He"), None)
    settings = {"drain_notice_seconds": 600, "drain_seconds": 600}
    async with running(backend, **settings) as (process, client):
        async with client.stream("POST", URL, json=REQUEST) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            process.send_signal(signal.SIGTERM)
            while (await client.get("/health")).status_code == 200:
                pass
            process.send_signal(signal.SIGTERM)
            text += "".join([part async for part in parts])
        status = await process.wait()

    assert '"code":"draining"' in text.split("\n\n")[-2]
    assert status == 0


async def test_invalid_settings() -> None:
    """All invalid settings are named at once, and the exit code is 2."""
    status, words = await refusal(port=70000, keep_alive_seconds="often")

    assert status == 2
    assert "TRIVIUM_FACADE_PORT" in words
    assert "TRIVIUM_FACADE_KEEP_ALIVE_SECONDS" in words


async def test_metrics_on_their_own_port(backend: ScriptedBackend) -> None:
    """The API's port then has none, as they would be those of a single replica."""
    port = free_port()
    async with running(backend, reuse_port=True, metrics_port=port) as (_, client):
        shared = await client.get("/metrics")
        own = await client.get(f"http://127.0.0.1:{port}/metrics")

    assert 404 == shared.status_code
    assert 'trivium_http_requests_total{route="/health",status="200"} 1.0' in own.text


async def test_metrics_of_a_target_without_addresses() -> None:
    """No tokenizer is serving, which an alert can tell by the series that says so."""
    port = free_port()
    process = await spawn(port=port, tokenizer_target="nowhere.invalid:50051")
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            while not await _answers(client, f"http://127.0.0.1:{port}/health/live"):
                assert process.returncode is None
                await asyncio.sleep(0.05)
            metrics = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    finally:
        process.kill()
        await process.communicate()

    assert 'trivium_replica_state{model_name="",replica="",state="serving"} 0.0' in metrics


async def test_a_shared_port_needs_a_metrics_port() -> None:
    """A facade that shares its port names the setting that is missing."""
    status, words = await refusal(port=free_port(), reuse_port=True)

    assert 2 == status
    assert "TRIVIUM_FACADE_METRICS_PORT: " in words
    assert "REUSE_PORT" in words


async def test_port_zero_picks_a_free_port() -> None:
    """The log says on which port it listens."""
    process = await spawn(port=0)
    assert process.stderr is not None
    async for line in process.stderr:
        if b"listening on" in line:
            break
    port = int(line.split(b"127.0.0.1:")[1].split(b'"')[0])
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{port}/health/live")
    process.kill()
    await process.communicate()

    assert 200 == answer.status_code


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("setting", ["TRIVIUM_FACADE_PORT", "TRIVIUM_FACADE_METRICS_PORT"])
async def test_a_port_in_use_is_refused(setting: str, is_shared: bool) -> None:
    """A port in use by a process that does not share it is reported with its setting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        ports = {"port": free_port(), "metrics_port": free_port()}
        ports[setting.removeprefix("TRIVIUM_FACADE_").lower()] = taken
        status, words = await refusal(reuse_port=is_shared, **ports)

    assert (2, f"{setting}: 127.0.0.1:{taken} is in use\n") == (status, words)


async def test_the_metrics_port_must_differ() -> None:
    """It must differ from the API's port; the error names its setting."""
    port = free_port()
    status, words = await refusal(port=port, metrics_port=port, log_level="warning")

    told = f"TRIVIUM_FACADE_METRICS_PORT: 127.0.0.1:{port} is in use\n"
    assert (2, told) == (status, words)


@pytest.mark.parametrize("host", ["::1", "[::1]", "::", "[::]"])
async def test_ipv6(host: str) -> None:
    """IPv6 works with or without brackets, for API and metrics; `::` includes IPv4, `::1` not."""
    ports = {"port": free_port(), "metrics_port": free_port()}
    is_remote = "1" not in host
    process = await spawn(host=host, allow_unauthenticated_remote=is_remote, **ports)
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            for address in ("[::1]", "127.0.0.1") if is_remote else ("[::1]",):
                for port, path in ((ports["port"], "/health/live"), (ports["metrics_port"], "/")):
                    while not await _answers(client, f"http://{address}:{port}{path}"):
                        assert process.returncode is None
                        await asyncio.sleep(0.05)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# In many containers, `localhost` has the address ::1 but the loopback interface has not.
NO_IPV6 = """
import socket
found = socket.getaddrinfo
def both(host, port, *args, **options):
    ipv6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", port, 0, 0))
    return [*found(host, port, *args, **options), *[ipv6] * (host == "localhost")]
socket.getaddrinfo = both
"""


async def test_localhost_without_ipv6(
    backend: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves at the addresses of its host name that the machine has."""
    (tmp_path / "sitecustomize.py").write_text(NO_IPV6)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    async with running(backend, host="localhost") as (_, client):
        assert 200 == (await client.get("/health/live")).status_code


async def test_an_unknown_host_name_is_refused() -> None:
    """In one line that names it."""
    status, words = await refusal(host="nowhere.invalid", allow_unauthenticated_remote=True, port=1)

    assert 2 == status
    assert words.startswith("TRIVIUM_FACADE_PORT: nowhere.invalid:1 cannot be bound: ")


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False


async def test_remote_access_without_keys_is_refused() -> None:
    """A non-loopback address needs API keys, or the operator's explicit permission."""
    status, words = await refusal(host="0.0.0.0")

    assert status == 2
    assert "TRIVIUM_FACADE_API_KEYS_FILE" in words
    assert "TRIVIUM_FACADE_ALLOW_UNAUTHENTICATED_REMOTE" in words


async def test_an_unusable_key_file_is_refused(tmp_path: Path) -> None:
    """An unusable key file is refused at startup."""
    status, words = await refusal(api_keys_file=tmp_path / "none")

    assert status == 2
    assert "TRIVIUM_FACADE_API_KEYS_FILE" in words


@pytest.mark.parametrize(
    ("setting", "value"), [("limits_url", "http://127.0.0.1"), ("usage_log", __file__)]
)
async def test_unusable_stores_and_folders_are_refused(setting: str, value: str) -> None:
    """A wrong store URL or folder is refused with one line that names the setting."""
    status, words = await refusal(port=free_port(), **{setting: value})

    assert status == 2
    assert f"TRIVIUM_FACADE_{setting.upper()}: " in words
    assert "Traceback" not in words


async def test_a_usage_log_has_one_writer(backend: ScriptedBackend, tmp_path: Path) -> None:
    """The second process is refused and the error says what to set; it starts under another name,
    and after the first was killed."""
    async with running(backend, usage_log=tmp_path) as (first, _):
        status, words = await refusal(port=free_port(), usage_log=tmp_path)
        async with running(backend, usage_log=tmp_path, log_name="second"):
            pass
        first.kill()
        await first.wait()
        async with running(backend, usage_log=tmp_path):
            pass

    assert 2 == status
    assert words.startswith("TRIVIUM_FACADE_USAGE_LOG: ")
    assert "usage.jsonl is in use by another process" in words
    assert "LOG_NAME" in words
