"""The REST API over TLS: who is accepted, what others get, and replaced certificates."""

import asyncio
import contextlib
import datetime
import json
import os
import signal
import socket
import ssl
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
import trustme

from tests.certificates import YESTERDAY, Files
from tests.ports import free_port
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header, usage
from tests.rest_facade.test_facade_process import ROOT

CA = trustme.CA()
OTHER_CA = trustme.CA()
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
URL = "/v1/chat/completions"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "server").write(CA)


def trusting(*authorities: trustme.CA, client: Files | None = None) -> ssl.SSLContext:
    """A client's context: the CAs it trusts and its own certificate."""
    context = ssl.create_default_context()
    for authority in authorities:
        authority.configure_trust(context)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


class Facade:
    """A facade process that serves TLS."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"https://127.0.0.1:{port}"
        self._log = log

    def client(self, context: ssl.SSLContext) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False, verify=context)

    def shown(self, context: ssl.SSLContext) -> str:
        """The serial number of the certificate that a new connection gets."""
        with (
            socket.create_connection(("127.0.0.1", self.port)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            found = secured.getpeercert()
        assert found is not None
        return str(found["serialNumber"])

    def log(self, level: str) -> list[str]:
        """Log messages of this level."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [line["message"] for line in lines if line["level"] == level]


@contextlib.asynccontextmanager
async def running(
    backend: ScriptedBackend, files: Files, is_mutual: bool = False, idle_seconds: int = 75
) -> AsyncIterator[Facade]:
    """A facade that is ready according to its metrics port."""
    port, metrics_port = free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIVIUM_")}
    environment |= {
        "TRIVIUM_FACADE_PORT": str(port),
        "TRIVIUM_FACADE_METRICS_PORT": str(metrics_port),
        "TRIVIUM_FACADE_TOKENIZER_TARGET": f"127.0.0.1:{backend.port}",
        "TRIVIUM_FACADE_DRAIN_NOTICE_SECONDS": "0",
        "TRIVIUM_FACADE_IDLE_CONNECTION_SECONDS": str(idle_seconds),
        **files.server("TRIVIUM_FACADE_", is_mutual),
    }
    log = files.folder / "log"
    with log.open("wb") as written:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rest_facade"), cwd=ROOT, env=environment, stderr=written
        )
    try:
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(is_ready, metrics_port):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        yield Facade(process, port, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def is_ready(metrics_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/healthz", timeout=60):
            return True
    except OSError:  # including HTTPError, for other statuses
        return False


async def test_openai_over_https(backend: ScriptedBackend, files: Files) -> None:
    """The official client streams over TLS if it trusts the CA; then the process drains."""
    async with running(backend, files) as facade:
        async with official_client(facade, trusting(OTHER_CA)) as client:
            with pytest.raises(openai.APIConnectionError) as refusal:
                await client.models.list()
        async with official_client(facade, trusting(CA)) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        facade.process.send_signal(signal.SIGTERM)
        status = await facade.process.wait()

    assert "CERTIFICATE_VERIFY_FAILED" in str(refusal.value.__cause__)
    assert "Hello world" == text
    assert 0 == status


async def test_a_drain_does_not_wait_for_idle_clients(
    backend: ScriptedBackend, files: Files
) -> None:
    """A pooled connection delays no exit, though its client reads it only when using it again."""
    async with running(backend, files) as facade:
        with (
            socket.create_connection(("127.0.0.1", facade.port)) as plain,
            trusting(CA).wrap_socket(plain, server_hostname="127.0.0.1") as pooled,
        ):
            pooled.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = await asyncio.to_thread(pooled.recv, 12)
            facade.process.send_signal(signal.SIGTERM)
            status = await facade.process.wait()

    assert b"HTTP/1.1 200" == answer
    assert 0 == status
    assert [] == facade.log("error")


async def test_a_client_that_reads_slowly(backend: ScriptedBackend, files: Files) -> None:
    """It gets the whole stream: only a client that has stopped reading is disconnected."""
    backend.script = (
        header(),
        *[delta("x" * 4_000_000) for _ in range(3)],
        delta(finish="STOP"),
        usage(),
    )
    body = json.dumps(REQUEST)
    head = f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    answer = b""
    async with running(backend, files, idle_seconds=1) as facade:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        plain.connect(("127.0.0.1", facade.port))
        reader, writer = await asyncio.open_connection(
            sock=plain, limit=2**16, ssl=trusting(CA), server_hostname="127.0.0.1"
        )
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        async with asyncio.timeout(60):
            while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                answer += await reader.readexactly(1) + await reader.read(2**16)
                await asyncio.sleep(0.1 if len(answer) < 4_000_000 else 0)
        writer.close()

    assert 12_000_000 < len(answer)


def official_client(facade: Facade, context: ssl.SSLContext) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{facade.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=facade.client(context),
    )


async def test_clients_need_a_certificate(
    backend: ScriptedBackend, files: Files, tmp_path: Path
) -> None:
    """With a client CA, clients without a certificate or with another CA's get no answer."""
    known = Files(tmp_path / "known").write(CA)
    strange = Files(tmp_path / "strange").write(OTHER_CA)
    async with running(backend, files, is_mutual=True) as facade:
        async with facade.client(trusting(CA, client=known)) as client:
            assert 200 == (await client.get("/v1/models")).status_code
        for stranger in (None, strange):
            async with facade.client(trusting(CA, client=stranger)) as client:
                with pytest.raises(httpx.TransportError):
                    await client.get("/v1/models")
        assert [] == facade.log("error")


async def test_plain_http_to_a_tls_port(backend: ScriptedBackend, files: Files) -> None:
    """The connection is closed at once, and TLS clients are not affected."""
    async with running(backend, files) as facade:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as plain:
            for _ in range(3):
                with pytest.raises(httpx.RemoteProtocolError):
                    await plain.get(f"http://127.0.0.1:{facade.port}/health")
        async with facade.client(trusting(CA)) as client:
            assert 200 == (await client.get("/health")).status_code
        assert [] == facade.log("error")


async def test_tls_to_a_plain_http_port(client: httpx.AsyncClient) -> None:
    """The error differs from that of an invalid certificate."""
    async with httpx.AsyncClient(timeout=60, trust_env=False, verify=trusting(CA)) as secure:
        with pytest.raises(httpx.ConnectError, match=r"(?i)wrong.version.number"):
            await secure.get(str(client.base_url.copy_with(scheme="https")) + "/health")

    assert 200 == (await client.get("/health")).status_code


async def test_old_versions_of_tls_are_refused(backend: ScriptedBackend, files: Files) -> None:
    """TLS 1.2 and 1.3 are accepted, with HTTP/1.1 over them, whatever else is offered."""
    spoken = {}
    async with running(backend, files) as facade:
        for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = trusting(CA)
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
            context.set_alpn_protocols(["h2", "http/1.1"])
            with pytest.warns() if version < ssl.TLSVersion.TLSv1_2 else contextlib.nullcontext():
                context.minimum_version = context.maximum_version = version
            try:
                spoken[version] = await asyncio.to_thread(alpn, facade.port, context)
            except ssl.SSLError:
                spoken[version] = "refused"

    assert ["refused", "http/1.1", "http/1.1"] == list(spoken.values())


def alpn(port: int, context: ssl.SSLContext) -> str | None:
    """The protocol that the server chooses."""
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        return secured.selected_alpn_protocol()


async def test_a_certificate_is_replaced_during_a_stream(
    backend: ScriptedBackend, files: Files, tmp_path: Path
) -> None:
    """The stream continues, new connections get the new certificate, and client certificates of the
    replaced CA are no longer accepted."""
    first, second = Files(tmp_path / "1").write(CA), Files(tmp_path / "2").write(OTHER_CA)
    before = trusting(CA, OTHER_CA, client=first)
    after = trusting(CA, OTHER_CA, client=second)
    finish = asyncio.Event()
    backend.script = (header(), delta("He"), finish, delta("llo", finish="STOP"), usage())
    async with (
        running(backend, files, is_mutual=True) as facade,
        facade.client(before) as client,
        facade.client(after) as newcomer,
        facade.client(before) as late,
    ):
        async with client.stream("POST", URL, json=REQUEST) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)
            known = await asyncio.to_thread(facade.shown, before)
            files.write(OTHER_CA)
            while known == await asyncio.to_thread(facade.shown, before):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            assert 200 == (await newcomer.get("/v1/models")).status_code
            with pytest.raises(httpx.TransportError):
                await late.get("/v1/models")
            finish.set()
            text += "".join([part async for part in parts])
        assert [] == facade.log("error")

    assert text.endswith("data: [DONE]\n\n")


async def test_an_expired_certificate_is_logged(backend: ScriptedBackend, tmp_path: Path) -> None:
    """A warning has the date; the certificate is still served, so that clients decide."""
    old = YESTERDAY - datetime.timedelta(days=30)
    files = Files(tmp_path / "old").write(CA, not_before=old, not_after=YESTERDAY)
    async with running(backend, files) as facade:
        async with facade.client(trusting(CA)) as client:
            with pytest.raises(httpx.ConnectError, match="certificate has expired"):
                await client.get("/health")
        warnings = facade.log("warning")

    assert [f"the certificate in {files.certificate} expired at {YESTERDAY}"] == warnings
