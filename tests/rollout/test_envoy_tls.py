"""The real Envoy calls a stage over mutual TLS, configured as in docs/tls.md."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml

from tests.certificates import Files
from tests.name_server import NameServer
from tests.ports import free_ports
from tests.rest_facade.scripted_backend import ScriptedBackend
from tests.rollout.proxy import endpoint, envoy
from trivium.chat.v1 import model_pb2, model_pb2_grpc
from trivium.wire.channel import open_channel
from trivium.wire.tls.server import ServerTls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Envoy's package is for Linux")

PAGE = Path(__file__).parents[2] / "docs" / "tls.md"
# This is in each cluster of stages.yaml.
PLACE = "      connect_timeout: 1s\n"


def socket_of_the_docs(files: Files) -> dict[str, Any]:
    """The documented `transport_socket`, with these files."""
    [text] = re.findall(r"```yaml\n(transport_socket:.*?)```", PAGE.read_text(), re.DOTALL)
    for name in ("tls.crt", "tls.key", "ca.crt"):
        assert f"/etc/trivium/{name}" in text
    found: dict[str, Any] = yaml.safe_load(text.replace("/etc/trivium", str(files.folder)))
    return found


async def test_envoy_calls_over_mutual_tls(tmp_path: Path) -> None:
    """A client without TLS is answered through a proxy that has a certificate."""
    ca = trustme.CA()
    server = Files(tmp_path / "server").write(ca, names=("tokenizer-svc",))
    backend = ScriptedBackend(ServerTls(server.certificate, server.key, server.ca))
    await backend.start()
    socket = json.dumps(socket_of_the_docs(Files(tmp_path / "proxy").write(ca)))
    entry, other = free_ports(2)
    replaced = {
        endpoint("0.0.0.0", 50051): endpoint("127.0.0.1", entry),
        endpoint("0.0.0.0", 50052): endpoint("127.0.0.1", other),
        endpoint("tokenizer_svc", 50051): endpoint("tokenizer.test", backend.port),
        PLACE: f"{PLACE}      {socket[1:-1]}\n",
    }
    with (
        NameServer(**{"tokenizer.test": ["127.0.0.1"]}) as names,
        envoy("stages.yaml", names, tmp_path, replaced),
    ):
        async with open_channel(f"127.0.0.1:{entry}") as channel, asyncio.timeout(60):
            stub: Any = model_pb2_grpc.ModelServiceStub(channel)
            while True:
                try:
                    models = await stub.ListModels(model_pb2.ListModelsRequest())
                    break
                except grpc.aio.AioRpcError:  # Envoy resolves names and checks health first
                    await asyncio.sleep(0.1)
    await backend.die()

    assert set(backend.model_names) == {model.id for model in models.models}
