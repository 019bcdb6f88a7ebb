"""Dockerfile, compose files and edge match the commands and the settings."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.images import (
    FINAL_ERRORS_SECONDS,
    ROOT,
    SERVICES,
    dockerfile,
    dockerfile_environment,
    instructions,
    last,
    read_settings,
)
from trivium.cli.pipeline import HUGE_PAGES, TUNABLES
from trivium.wire.errors import ERRORS


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(loaded, dict)
    return loaded


def default(service: str, field: str) -> Any:
    return SERVICES[service].model_fields[field].default


@pytest.mark.parametrize("service", SERVICES)
def test_each_target_starts_its_service(service: str) -> None:
    """A service's target runs its module and exposes its ports."""
    ports = [default(service, "port"), default(service, "metrics_port")]
    exposed = [int(port) for port in last(service, "EXPOSE").split()]

    assert ["python", "-m", service] == json.loads(last(service, "CMD"))
    assert [port for port in ports if port] == exposed


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("has_tls", [False, True])
def test_health_checks_work_with_tls(
    service: str, has_tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They use the metrics port, which never has TLS, or the REST port with TLS if that is on."""
    port = default(service, "metrics_port")
    scheme = "https" if has_tls and not port else "http"
    expected = (
        f"127.0.0.1:{port}/healthz" if port else f"127.0.0.1:{default(service, 'port')}/health"
    )
    command = json.loads(last(service, "HEALTHCHECK").partition("CMD ")[2])
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if has_tls:
        monkeypatch.setenv("TRIVIUM_FACADE_TLS_CERT_FILE", "facade.crt")
    told = subprocess.check_output(command, text=True)

    assert f"-m trivium.cli.probe {scheme}://{expected}\n" == told


def test_the_generator_uses_huge_pages() -> None:
    """The image sets the same variable as `trivium up`."""
    assert HUGE_PAGES == dockerfile_environment("generator_svc")[TUNABLES]


@pytest.mark.parametrize("target", [*SERVICES, "generator_svc-cuda", "export"])
def test_images_write_only_to_tmp(target: str) -> None:
    """The root may be read-only and the user arbitrary: home is /tmp. No telemetry is sent."""
    environment = dockerfile_environment(target)

    assert "/tmp" == environment["HOME"]
    assert "1" == environment["ORT_DISABLE_TELEMETRY"]


@pytest.mark.parametrize("target", [*SERVICES, "generator_svc-cuda"])
def test_the_stop_signal_starts_a_drain(target: str) -> None:
    """Containers are stopped with the signal on which services drain."""
    assert "SIGTERM" == last(target, "STOPSIGNAL")


@pytest.mark.parametrize("target", [*SERVICES, "generator_svc-cuda", "export"])
def test_nothing_runs_as_root(target: str) -> None:
    """Every target ends up as an ordinary user."""
    assert last(target, "USER") == "10001"


@pytest.mark.parametrize("target", [*SERVICES, "generator_svc-cuda"])
def test_serving_images_have_no_pytorch(target: str) -> None:
    """What is copied into a serving image was installed without the export extra."""
    sources = re.findall(r"--from=(\S+)", "\n".join(instructions(target)))
    installed = [line for source in sources for line in instructions(source)]

    assert sources
    assert [] == [line for line in installed if "export" in line]


def test_copied_paths_exist() -> None:
    """Each path copied into an image exists and is not excluded by .dockerignore."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [line.split()[1:-1] for line in instructions("build") if line.startswith("COPY ")]
    paths = [path for line in copied for path in line]

    assert len(paths) == 8
    assert [] == [path for path in paths if not (ROOT / path).exists()]
    assert [] == [path for path in paths if f"!{path}" not in ignore]


@pytest.mark.parametrize("service", SERVICES)
def test_compose_builds_each_service_from_its_target(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each service is built from its target, with valid settings."""
    found = compose()["services"][service]
    environment = {**dockerfile_environment(service), **found["environment"]}
    settings = read_settings(service, environment, monkeypatch)

    assert found["build"] == {"context": ".", "target": service}
    assert settings.host == "0.0.0.0"  # type: ignore[attr-defined]
    assert settings.is_guarded  # type: ignore[attr-defined]


def test_compose_collects_usage_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages that write them log them to standard output, for `docker compose logs`."""
    for name in ("rest_facade", "generator_svc"):
        environment = compose()["services"][name]["environment"]
        settings = read_settings(name, environment, monkeypatch)

        assert "-" == settings.usage_log  # type: ignore[attr-defined]


def test_compose_fetches_gated_models() -> None:
    """The export gets the user's token and hub endpoint."""
    assert ["HF_TOKEN", "HF_ENDPOINT"] == compose()["services"]["export"]["environment"]


@pytest.mark.parametrize("service", SERVICES)
def test_compose_can_scale_each_stage(service: str) -> None:
    """No stage has a fixed name or a port of the host."""
    assert not {"container_name", "ports", "hostname"} & compose()["services"][service].keys()


@pytest.mark.parametrize("service", SERVICES)
def test_compose_has_read_only_roots_and_waits_for_drains(service: str) -> None:
    """Root file systems are read-only, and no service is killed while it drains."""
    found = compose()["services"][service]
    drains = default(service, "drain_notice_seconds") + default(service, "drain_seconds")

    assert found["read_only"] is True
    assert "/tmp" in found["tmpfs"]
    assert ["ALL"] == found["cap_drop"]
    assert found["init"] is True  # process 1 would ignore SIGTERM during startup
    assert int(found["stop_grace_period"].removesuffix("s")) > drains + FINAL_ERRORS_SECONDS


def test_stages_call_each_other_by_name() -> None:
    """Targets are the next service's DNS name, which resolves to all replicas, and its port."""
    services = compose()["services"]
    chat = services["rest_facade"]["environment"]["TRIVIUM_FACADE_TOKENIZER_TARGET"]
    generator = services["tokenizer_svc"]["environment"]["TRIVIUM_TOKENIZER_GENERATOR_TARGET"]

    assert f"dns:///tokenizer_svc:{default('tokenizer_svc', 'port')}" == chat
    assert f"dns:///generator_svc:{default('generator_svc', 'port')}" == generator


def test_the_gpu_variant_reserves_a_device() -> None:
    """The override changes the generator's target and gives it a GPU, and nothing else."""
    services = compose("compose.gpu.yaml")["services"]
    generator = services["generator_svc"]
    (device,) = generator["deploy"]["resources"]["reservations"]["devices"]

    assert {"generator_svc"} == set(services)
    assert generator["build"]["target"] in dockerfile()
    assert ["gpu"] == device["capabilities"]


def test_the_edges_own_errors_are_openais() -> None:
    """Its own responses are OpenAI's error objects, with status and type as in docs/errors.md."""
    config = (ROOT / "deploy" / "nginx.conf").read_text()
    said = re.findall(r"return (\d+) '(.*)';", config)

    assert len(said) == 5
    for status, body in said:
        error = json.loads(body.replace("\\'", "'"))["error"]
        assert {"message", "type", "param", "code"} == set(error)
        assert (int(status), error["type"]) == (
            ERRORS[error["code"]].http,
            ERRORS[error["code"]].type,
        )


def test_the_edge_is_ready_when_the_services_are() -> None:
    """Its health check calls the facade through it, and its stop waits for the services'."""
    edge = compose()["services"]["edge"]

    assert "http://127.0.0.1:8080/health" == edge["healthcheck"]["test"][-1]
    assert {"rest_facade", "tokenizer_svc"} == set(edge["depends_on"])
    assert compose()["services"]["rest_facade"]["stop_grace_period"] == edge["stop_grace_period"]


def test_envoy_can_replace_nginx() -> None:
    """The override changes only the edge, which has nginx's ports and the services' addresses."""
    services = compose("compose.envoy.yaml")["services"]
    edge = services["edge"]
    (mount,) = edge["volumes"]
    source, target, mode = mount.split(":")
    config = yaml.safe_load((ROOT / source).read_text())["static_resources"]
    listening = [one["address"]["socket_address"]["port_value"] for one in config["listeners"]]
    called = [
        one["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
        for one in config["clusters"]
    ]
    published = [port.split(":")[-1] for port in compose()["services"]["edge"]["ports"]]

    assert {"edge"} == set(services)
    assert ["-c", target] == edge["command"]
    assert "ro" == mode
    assert published == [str(port) for port in listening]
    assert [("rest_facade", 8000), ("tokenizer_svc", 50051)] == [
        (one["socket_address"]["address"], one["socket_address"]["port_value"]) for one in called
    ]
