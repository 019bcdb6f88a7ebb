"""The three services with mutual TLS between them."""

import datetime
import urllib.request
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.certificates import YESTERDAY, Files
from tests.pipeline.services import Services

CA = trustme.CA()
OTHER_CA = trustme.CA()
SOON = YESTERDAY + datetime.timedelta(days=3)


def probed(port: int, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return int(answer.status)


def expiries(port: int) -> dict[str, float]:
    """When certificates expire, by file, according to the metrics at this port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    name = "trivium_tls_certificate_expiry_timestamp_seconds"
    [family] = (family for family in families if family.name == name)
    return {sample.labels["file"]: sample.value for sample in family.samples}


def code(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """The status of a server's health check."""
    if credentials is None:
        channel = grpc.insecure_channel(target)
    else:
        channel = grpc.secure_channel(target, credentials)
    with channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.timeout(600)
def test_stages_call_each_other_over_mutual_tls(tiny_model: Path, tmp_path: Path) -> None:
    """Requests succeed, also after each certificate was renewed, as metrics show; probes need no
    certificate; clients without one, or with one of another CA, reach neither gRPC port."""
    facade, tokenizer, generator = (
        Files(tmp_path / name).write(CA) for name in ("facade", "tokenizer", "generator")
    )
    strange = Files(tmp_path / "strange").write(OTHER_CA)
    settings = {
        **facade.channel("TRIVIUM_FACADE_TOKENIZER_"),
        **tokenizer.server("TRIVIUM_TOKENIZER_", is_mutual=True),
        **tokenizer.channel("TRIVIUM_TOKENIZER_GENERATOR_"),
        **generator.server("TRIVIUM_GENERATOR_", is_mutual=True),
        "TRIVIUM_TOKENIZER_LOG_LEVEL": "info",
        "TRIVIUM_GENERATOR_LOG_LEVEL": "info",
    }
    with Services(tiny_model, tmp_path, **settings) as services:
        assert "length" == services.finish_reason()

        pipeline = services.pipeline
        for port in (pipeline.tokenizer_metrics_port, pipeline.generator_metrics_port):
            assert 200 == probed(port, "/healthz") == probed(port, "/livez")

        root = CA.cert_pem.bytes()
        inside = grpc.ssl_channel_credentials(
            root, facade.key.read_bytes(), facade.certificate.read_bytes()
        )
        outside = grpc.ssl_channel_credentials(
            root, strange.key.read_bytes(), strange.certificate.read_bytes()
        )
        for target in (services.chat_target, services.generator_target):
            assert grpc.StatusCode.OK is code(target, inside)
            for stranger in (None, grpc.ssl_channel_credentials(root), outside):
                assert grpc.StatusCode.UNAVAILABLE is code(target, stranger)

        for files in (facade, tokenizer, generator):
            files.write(CA, not_after=SOON)
        for name in ("tokenizer_svc", "generator_svc"):
            read = str(tmp_path / name.removesuffix("_svc"))
            line = f"reloaded TLS files: {read}"
            services.until(lambda n=name, said=line: said in services.log(n), f"{name}: no {line}")
        assert "length" == services.finish_reason()
        for port, files in (
            (pipeline.port, facade),
            (pipeline.tokenizer_metrics_port, tokenizer),
            (pipeline.generator_metrics_port, generator),
        ):
            renewed = {str(files.certificate): SOON.timestamp()}
            services.until(lambda n=port, dates=renewed: dates == expiries(n), f"not {renewed}")
