"""TLS of gRPC servers and channels: which calls are accepted, and files that are replaced."""

import asyncio
import contextlib
import datetime
import fnmatch
import logging
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rest_facade.backend import Backend
from rest_facade.config import FacadeSettings
from rest_facade.convert import chat
from tests.certificates import YESTERDAY, Files
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header, usage
from tokenizer_svc.config import TokenizerSettings
from trivium.wire.channel import open_channel
from trivium.wire.replicas.replica import ReplicaState
from trivium.wire.serving import GrpcServer
from trivium.wire.settings import load_settings
from trivium.wire.tls.channel import ChannelTls
from trivium.wire.tls.files import CHECK_SECONDS
from trivium.wire.tls.pem import expiry
from trivium.wire.tls.server import ServerTls

CA = trustme.CA()
OTHER_CA = trustme.CA()


@pytest.fixture
def server_files(tmp_path: Path) -> Files:
    return Files(tmp_path / "server").write(CA)


@pytest.fixture
def client_files(tmp_path: Path) -> Files:
    return Files(tmp_path / "client").write(CA)


@contextlib.asynccontextmanager
async def serving(files: Files, is_mutual: bool = False) -> AsyncIterator[int]:
    """A gRPC server with nothing but health; yields its port."""
    tls = ServerTls(files.certificate, files.key, files.ca if is_mutual else None)
    server = GrpcServer([], [], tls=tls)
    port = await server.start("127.0.0.1:0")
    server.set_serving(True)
    yield port
    await server.drain(0, 0)


async def check(port: int, tls: ChannelTls | None = None, host: str = "127.0.0.1") -> str:
    """`serving`, or the error."""
    async with open_channel(f"{host}:{port}", tls=tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
    return "serving"


def shown(port: int, client: Files | None = None) -> str:
    """The serial number of the certificate that a new connection to `port` gets."""
    context = ssl.create_default_context(cadata=CA.cert_pem.bytes().decode())
    context.load_verify_locations(cadata=OTHER_CA.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        found = secured.getpeercert()
    assert found is not None
    return str(found["serialNumber"])


async def until(condition: Callable[[], object]) -> None:
    """Polls for up to a minute."""
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - files have no event
            await asyncio.sleep(0.1)


async def test_calls_over_tls(server_files: Files, client_files: Files) -> None:
    """With the server's CA calls succeed, by address and by name; without TLS they fail."""
    async with serving(server_files) as port:
        assert "serving" == await check(port, ChannelTls(client_files.ca))
        assert "serving" == await check(port, ChannelTls(client_files.ca), "localhost")
        assert "serving" != await check(port)


async def test_a_server_of_an_unknown_ca_is_refused(server_files: Files, tmp_path: Path) -> None:
    """This client does not trust its certificate."""
    strange = Files(tmp_path / "strange").write(OTHER_CA)
    async with serving(server_files) as port:
        assert "CERTIFICATE_VERIFY_FAILED" in await check(port, ChannelTls(strange.ca))


async def test_a_server_with_another_name_is_refused(tmp_path: Path) -> None:
    """The expected name can be set; a certificate with any other is refused."""
    named = Files(tmp_path / "named").write(CA, names=("tokenizer.test",))
    async with serving(named) as port:
        assert "Hostname Verification" in await check(port, ChannelTls(named.ca))
        tls = ChannelTls(named.ca, server_name="tokenizer.test")
        assert "serving" == await check(port, tls)
        tls = ChannelTls(named.ca, server_name="generator.test")
        assert "Hostname Verification" in await check(port, tls)


async def test_clients_need_a_certificate_of_the_ca(
    server_files: Files, client_files: Files, tmp_path: Path
) -> None:
    """With a client CA, clients without a certificate or with another CA's are refused."""
    strange = Files(tmp_path / "strange").write(OTHER_CA, trusted=CA)
    async with serving(server_files, is_mutual=True) as port:
        assert "serving" == await check(port, channel_tls(client_files))
        assert "serving" != await check(port, ChannelTls(client_files.ca))
        assert "serving" != await check(port, channel_tls(strange))
        assert "serving" == await check(port, channel_tls(client_files))


def channel_tls(files: Files) -> ChannelTls:
    return ChannelTls(files.ca, files.certificate, files.key)


async def test_an_expired_certificate_is_logged_and_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server logs once when its certificate expired; clients do not call it."""
    old = YESTERDAY - datetime.timedelta(days=30)
    files = Files(tmp_path / "old").write(CA, not_before=old, not_after=YESTERDAY)
    async with serving(files) as port:
        await until(lambda: caplog.records)
        assert "CERTIFICATE_VERIFY_FAILED" in await check(port, ChannelTls(files.ca))

    [warning] = caplog.records
    assert f"{files.certificate} expired at {YESTERDAY}" in warning.getMessage()
    assert logging.WARNING == warning.levelno


@pytest.mark.parametrize("year", [1987, 2049, 2050, 2130])
def test_expiry_dates_are_parsed(year: int) -> None:
    """The date agrees with an X.509 library's, however the year is encoded."""
    date = datetime.datetime(year, 2, 28, 23, 59, 58, tzinfo=datetime.UTC)
    begin = datetime.datetime(1980, 1, 1, tzinfo=datetime.UTC)
    pem = CA.issue_cert("a.test", not_before=begin, not_after=date).cert_chain_pems[0].bytes()

    assert date == expiry(pem) == x509.load_pem_x509_certificate(pem).not_valid_after_utc


class CertificateRecorder(ScriptedBackend):
    """Records the certificate of the last ListModels caller."""

    caller = b""

    async def ListModels(self, request: Any, context: Any) -> Any:
        [self.caller] = context.auth_context()["x509_pem_cert"]
        return await super().ListModels(request, context)


async def test_files_are_replaced_during_a_stream(server_files: Files, client_files: Files) -> None:
    """Both sides switch to another CA: a stream continues, calls succeed all the time, and new
    connections use and require the new certificates."""
    backend = CertificateRecorder(
        ServerTls(server_files.certificate, server_files.key, server_files.ca)
    )
    await backend.start()
    finish = asyncio.Event()
    backend.script = (header(), delta("He"), finish, delta("llo", finish="STOP"), usage())
    async with Backend(f"127.0.0.1:{backend.port}", tls=channel_tls(client_files)) as client:
        stream = client.stream_chat(chat.Request(model=MODEL))
        events = [await stream.read(), await stream.read()]
        first, old = shown(backend.port, client_files), channel_tls(client_files)
        server_files.write(OTHER_CA)
        client_files.write(OTHER_CA)
        async with asyncio.timeout(60):
            while same_certificate(backend.caller, client_files.certificate) is False:
                await client.models()
                await asyncio.sleep(0.02)
        assert first != shown(backend.port, client_files)
        assert "serving" != await check(backend.port, old)
        [replica] = client.replicas.replicas
        assert (ReplicaState.SERVING, 1) == (replica.state, replica.outstanding)
        finish.set()
        while (event := await stream.read()) is not None:
            events.append(event)
        stream.close()
    await backend.die()

    assert ["He", "llo"] == [e.delta.content for e in events if e and e.HasField("delta")]


def same_certificate(pem: bytes, path: Path) -> bool:
    return pem.split() == path.read_bytes().split()


async def test_invalid_files_change_nothing(
    server_files: Files, client_files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    """The old ones stay in use, with one error in the log, until the files are valid again."""
    async with serving(server_files) as port:
        first = shown(port)
        server_files.key.write_text("no key")
        await until(lambda: caplog.records)
        await asyncio.sleep(3 * CHECK_SECONDS)
        assert first == shown(port)
        assert "serving" == await check(port, ChannelTls(client_files.ca))
        [error] = caplog.records
        assert f"{server_files.key}: not a PEM private key" in error.getMessage()
        assert logging.ERROR == error.levelno
        server_files.write(CA)
        await until(lambda: shown(port) != first)

    assert 1 == len([one for one in caplog.records if one.levelno >= logging.WARNING])


async def test_symlinked_files_are_reloaded(server_files: Files, tmp_path: Path) -> None:
    """Kubernetes replaces a secret like this: files are links through a link that changes."""
    Files(tmp_path / "second").write(CA)
    link = tmp_path / "..data"
    link.symlink_to("server")
    mounted = Files(tmp_path / "mounted")
    mounted.folder.mkdir()
    for path in (mounted.certificate, mounted.key, mounted.ca):
        path.symlink_to(Path("..", "..data", path.name))
    async with serving(mounted) as port:
        first = shown(port)
        fresh = tmp_path / "..new"
        fresh.symlink_to("second")
        fresh.rename(link)
        await until(lambda: shown(port) != first)


SERVER, CHANNEL = "TRIVIUM_FACADE_TLS_", "TRIVIUM_FACADE_TOKENIZER_TLS_"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({f"{SERVER}CERT_FILE": "tls.crt"}, f"{SERVER}KEY_FILE: required with TLS_CERT_FILE"),
        ({f"{SERVER}KEY_FILE": "tls.key"}, f"{SERVER}KEY_FILE: requires TLS_CERT_FILE"),
        (
            {f"{SERVER}CLIENT_CA_FILE": "ca.crt"},
            f"{SERVER}CLIENT_CA_FILE: requires TLS_CERT_FILE",
        ),
        (
            {f"{SERVER}CERT_FILE": "tls.crt", f"{SERVER}KEY_FILE": "strange.key"},
            f"{SERVER}KEY_FILE: */strange.key: does not match the certificate */tls.crt",
        ),
        (
            {f"{SERVER}CERT_FILE": "tls.crt", f"{SERVER}KEY_FILE": "locked.key"},
            f"{SERVER}KEY_FILE: */locked.key: not a PEM private key without a passphrase",
        ),
        (
            {f"{SERVER}CERT_FILE": "tls.crt", f"{SERVER}KEY_FILE": "gone.key"},
            f"{SERVER}KEY_FILE: */gone.key: cannot be read: No such file or directory",
        ),
        (
            {f"{SERVER}CERT_FILE": "tls.key", f"{SERVER}KEY_FILE": "tls.key"},
            f"{SERVER}CERT_FILE: */tls.key: contains no PEM certificate",
        ),
        (
            {f"{CHANNEL}CA_FILE": "empty"},
            f"{CHANNEL}CA_FILE: */empty: contains no PEM certificate",
        ),
        (
            {f"{CHANNEL}CERT_FILE": "tls.crt", f"{CHANNEL}KEY_FILE": "tls.key"},
            f"{CHANNEL}CERT_FILE: requires TOKENIZER_TLS_CA_FILE",
        ),
        (
            {f"{CHANNEL}CA_FILE": "ca.crt", f"{CHANNEL}CERT_FILE": "tls.crt"},
            f"{CHANNEL}KEY_FILE: required with TOKENIZER_TLS_CERT_FILE",
        ),
        (
            {f"{CHANNEL}SERVER_NAME": "tokenizer.test"},
            f"{CHANNEL}SERVER_NAME: requires TOKENIZER_TLS_CA_FILE",
        ),
    ],
)
def test_invalid_settings_are_refused(
    settings: dict[str, str],
    words: str,
    server_files: Files,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line names the setting, the file and the problem."""
    folder = server_files.folder
    (folder / "empty").touch()
    strange = ec.generate_private_key(ec.SECP256R1())
    for name, locked in (
        ("strange.key", serialization.NoEncryption()),
        ("locked.key", serialization.BestAvailableEncryption(b"secret")),
    ):
        pem = strange.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked
        )
        (folder / name).write_bytes(pem)
    for name, value in settings.items():
        is_name = name.endswith("SERVER_NAME")
        monkeypatch.setenv(name, value if is_name else str(folder / value))
    with pytest.raises(SystemExit) as exit:
        load_settings(FacadeSettings)

    [line] = capsys.readouterr().err.splitlines()
    assert fnmatch.fnmatch(line, words)
    assert 2 == exit.value.code


def test_valid_settings_are_accepted(
    server_files: Files, client_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are accepted for servers and channels; with a client CA, clients are authenticated."""
    settings = {
        **server_files.server("TRIVIUM_TOKENIZER_", is_mutual=True),
        **client_files.channel("TRIVIUM_TOKENIZER_GENERATOR_"),
        "TRIVIUM_TOKENIZER_MODEL_DIRECTORY": "models/any",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    mutual = load_settings(TokenizerSettings)
    monkeypatch.delenv("TRIVIUM_TOKENIZER_TLS_CLIENT_CA_FILE")

    assert mutual.authenticates_clients_by_tls
    assert not load_settings(TokenizerSettings).authenticates_clients_by_tls
    assert mutual.server_tls() is not None
    assert mutual.generator_tls() is not None


@pytest.fixture
def made_by_the_docs(tmp_path: Path) -> Path:
    """A folder in which the commands in docs/tls.md were run."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    page = (Path(__file__).parents[1] / "docs" / "tls.md").read_text()
    [commands] = re.findall(r"```sh\n(openssl .*?)```", page, re.DOTALL)
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    strict = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "tokenizer.crt"]
    subprocess.run(strict, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


async def test_the_documented_openssl_commands(made_by_the_docs: Path) -> None:
    """They create certificates for mutual TLS that even strict clients accept."""
    folder = made_by_the_docs
    ca = folder / "ca.crt"
    tls = ServerTls(folder / "tokenizer.crt", folder / "tokenizer.key", ca)
    server = GrpcServer([], [], tls=tls)
    port = await server.start("127.0.0.1:0")
    server.set_serving(True)
    caller = ChannelTls(ca, folder / "facade.crt", folder / "facade.key")
    found = await check(port, caller), await check(port, ChannelTls(ca))
    await server.drain(0, 0)

    assert "serving" == found[0]
    assert found[1].startswith("UNAVAILABLE")
