"""The log names unreachable targets and the reason, but not while they are starting."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from tests.certificates import Files
from tests.name_server import NameServer
from tests.ports import free_port
from tests.tokenizer_svc.scripted_generator import ScriptedGenerator
from tokenizer_svc.generator.client import GeneratorClient
from trivium.wire.replicas import outage
from trivium.wire.replicas.replica_set import ReplicaSet
from trivium.wire.serving import GrpcServer
from trivium.wire.tls.channel import ChannelTls

SERVICE = "trivium.chat.v1.ChatService"


@pytest.fixture
def lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outages are reported at once."""
    monkeypatch.setattr(outage, "OUTAGE_SECONDS", 0)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings in the log."""
    return lambda: [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]


@asynccontextmanager
async def following(target: str, tls: ChannelTls | None = None) -> AsyncIterator[ReplicaSet]:
    replicas = ReplicaSet(target, SERVICE, tls=tls)
    yield replicas
    await replicas.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the log has no event
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("lasts")
async def test_unreachable_addresses_are_logged_once(warnings: Callable[[], list[str]]) -> None:
    """Each outage is logged once; one unreachable address among several is not an outage."""
    port = free_port()
    with NameServer(both=["127.0.0.1", "127.0.0.9"]) as names:
        async with following(names.target("both", port)) as replicas:
            await until(warnings)
            await asyncio.sleep(2.5)
            [first] = warnings()
            server = GrpcServer([], [SERVICE])
            await server.start(f"127.0.0.1:{port}")
            server.set_serving(True)
            await until(lambda: replicas.serving)
            await asyncio.sleep(1.5)
            found = warnings()
            await server.drain(0, 0)
            await until(lambda: len(warnings()) > 1)

    assert first.startswith(f"both:{port} cannot be reached: UNAVAILABLE: ")
    assert "Connection refused" in first
    assert [first] == found


async def test_outages_are_not_logged_during_startup(warnings: Callable[[], list[str]]) -> None:
    """Stages start together, and a name may be registered after the first lookup."""
    port = free_port()
    async with following(f"127.0.0.1:{port},nosuch.invalid:{port}"):
        await asyncio.sleep(3)

    assert [] == warnings()


@pytest.mark.usefixtures("lasts")
async def test_an_unknown_host_name(warnings: Callable[[], list[str]]) -> None:
    """It is logged once."""
    with NameServer() as names:
        async with following(names.target("tokenizer", 5)):
            await until(warnings)
            await asyncio.sleep(2.5)

    assert ["tokenizer:5 cannot be resolved: Domain name not found"] == warnings()


@pytest.mark.usefixtures("lasts")
async def test_a_port_of_another_protocol(warnings: Callable[[], list[str]]) -> None:
    """This may be the facade's own port, which speaks HTTP/1."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with following(f"127.0.0.1:{port}"):
        await until(warnings)
    server.close()

    assert warnings()[0].startswith(f"127.0.0.1:{port} cannot be reached: UNAVAILABLE: ")
    assert "http1.x" in warnings()[0]


@pytest.mark.usefixtures("lasts")
async def test_tls_to_plain_text(warnings: Callable[[], list[str]], tmp_path: Path) -> None:
    """The handshake fails, as with a certificate that is not accepted."""
    files = Files(tmp_path / "client").write(trustme.CA())
    server = GrpcServer([], [SERVICE])
    port = await server.start("127.0.0.1:0")
    async with following(f"127.0.0.1:{port}", ChannelTls(files.ca)):
        await until(warnings)
    await server.drain(0, 0)

    assert warnings()[0].startswith(f"127.0.0.1:{port} cannot be reached: UNAVAILABLE: ")
    assert "handshake failed" in warnings()[0]


@pytest.mark.usefixtures("lasts")
async def test_a_tokenizers_target_that_is_not_a_generator(
    warnings: Callable[[], list[str]],
) -> None:
    """The port is reachable, but belongs to another stage."""
    server = GrpcServer([], [SERVICE])
    port = await server.start("127.0.0.1:0")
    client = GeneratorClient(f"127.0.0.1:{port}", "r1")
    await until(warnings)
    await asyncio.sleep(1.5)
    await client.close()
    await server.drain(0, 0)

    assert [f"127.0.0.1:{port} does not report its load: UNIMPLEMENTED: Method not found!"] == (
        warnings()
    )


@pytest.mark.usefixtures("lasts")
async def test_a_reachable_generator_logs_nothing(warnings: Callable[[], list[str]]) -> None:
    """Nothing is logged."""
    server, port = await ScriptedGenerator("r1").serve()
    client = GeneratorClient(f"127.0.0.1:{port}", "r1")
    await asyncio.sleep(2)
    await client.close()
    await server.drain(0, 0)

    assert [] == warnings()
