"""Dockerfile, compose files, edge and Kubernetes tree: true to the commands and the settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings

from generator_svc.config import GeneratorSettings
from rest_facade.config import FacadeSettings
from tokenizer_svc.config import TokenizerSettings
from trivium.cli.pipeline import HUGE_PAGES, TUNABLES
from trivium.wire.errors import ERRORS

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SERVICES: dict[str, type[BaseSettings]] = {
    "rest_facade": FacadeSettings,
    "tokenizer_svc": TokenizerSettings,
    "generator_svc": GeneratorSettings,
}
LAST_WORDS_SECONDS = 5  # what the facade takes after its drain to end cut streams


def dockerfile() -> dict[str, tuple[str, list[str]]]:
    """Stages by name: what each is built from, and its instructions."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    stages: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        start = re.fullmatch(r"FROM (\S+) AS (\S+)", line)
        if start:
            lines: list[str] = []
            stages[start[2]] = (start[1], lines)
        elif stages and line and not line.startswith("#"):
            lines.append(line)
    return stages


def instructions(target: str) -> list[str]:
    """All instructions of a stage, those of its ancestors first."""
    parent, lines = dockerfile()[target]
    return [*(instructions(parent) if parent in dockerfile() else []), *lines]


def last(target: str, word: str) -> str:
    return [line for line in instructions(target) if line.startswith(f"{word} ")][-1][
        len(word) + 1 :
    ]


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(loaded, dict)
    return loaded


def default(service: str, field: str) -> Any:
    return SERVICES[service].model_fields[field].default


def dockerfile_environment(target: str) -> dict[str, str]:
    pairs = [line[4:].split() for line in instructions(target) if line.startswith("ENV ")]
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def read_settings(
    service: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> BaseSettings:
    """The service's settings in that environment; raises if one is wrong or none of ours."""
    prefix = SERVICES[service].model_config["env_prefix"]
    ours = {name: value for name, value in environment.items() if name.startswith("TRIVIUM_")}
    known = {f"{prefix}{field}".upper() for field in SERVICES[service].model_fields}
    assert ours.keys() <= known
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return SERVICES[service]()


@pytest.mark.parametrize("service", SERVICES)
def test_each_target_starts_its_service(service: str) -> None:
    """A service's target runs its module, exposes its ports, and asks its own health."""
    ports = [default(service, "port"), SERVICES[service].model_fields.get("metrics_port")]
    exposed = [int(port) for port in last(service, "EXPOSE").split()]
    probe = json.loads(last(service, "HEALTHCHECK").partition("CMD ")[2])

    assert ["python", "-m", service] == json.loads(last(service, "CMD"))
    assert [port if isinstance(port, int) else port.default for port in ports if port] == exposed
    assert ["python", "-m", "trivium.cli.probe"] == probe[:3]
    assert f"://127.0.0.1:{ports[0]}/" in probe[3]


def test_the_generator_has_its_weights_in_huge_pages() -> None:
    """As `trivium up` starts it."""
    assert HUGE_PAGES == dockerfile_environment("generator_svc")[TUNABLES]


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


def test_what_is_copied_exists() -> None:
    """Each path that is copied into an image exists and is let through by .dockerignore."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [line.split()[1:-1] for line in instructions("build") if line.startswith("COPY ")]
    paths = [path for line in copied for path in line]

    assert len(paths) == 7
    assert [] == [path for path in paths if not (ROOT / path).exists()]
    assert [] == [path for path in paths if f"!{path}" not in ignore]


@pytest.mark.parametrize("service", SERVICES)
def test_compose_starts_what_the_dockerfile_has(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each service is built from its target, with settings that it accepts."""
    found = compose()["services"][service]
    environment = {**dockerfile_environment(service), **found["environment"]}
    settings = read_settings(service, environment, monkeypatch)

    assert found["build"] == {"context": ".", "target": service}
    assert settings.host == "0.0.0.0"  # type: ignore[attr-defined]
    if isinstance(settings, FacadeSettings):
        assert not settings.exposes_without_keys()


@pytest.mark.parametrize("service", SERVICES)
def test_compose_can_scale_each_stage(service: str) -> None:
    """Nothing of a stage exists once only: no name, no port of the host."""
    assert not {"container_name", "ports", "hostname"} & compose()["services"][service].keys()


@pytest.mark.parametrize("service", SERVICES)
def test_compose_hardens_and_waits(service: str) -> None:
    """Root file systems are read-only, and no service is killed while it drains."""
    found = compose()["services"][service]
    drains = default(service, "drain_notice_seconds") + default(service, "drain_seconds")

    assert found["read_only"] is True
    assert ["ALL"] == found["cap_drop"]
    assert int(found["stop_grace_period"].removesuffix("s")) > drains + LAST_WORDS_SECONDS


def test_stages_call_each_other_by_name() -> None:
    """Targets name the next service, by DNS so that all replicas are used, and its port."""
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


def test_the_edge_speaks_like_the_facade() -> None:
    """Its own answers are OpenAI's error object, with status and type of the table of errors."""
    config = (ROOT / "deploy" / "nginx.conf").read_text()
    said = re.findall(r"return (\d+) '(.*)';", config)

    assert len(said) == 3
    for status, body in said:
        error = json.loads(body.replace("\\'", "'"))["error"]
        assert {"message", "type", "param", "code"} == set(error)
        assert (int(status), error["type"]) == (
            ERRORS[error["code"]].http,
            ERRORS[error["code"]].type,
        )


def test_the_edge_finds_the_services() -> None:
    """It calls them by their names and ports, and limits the time of a head."""
    config = (ROOT / "deploy" / "nginx.conf").read_text()

    assert f"rest_facade:{default('rest_facade', 'port')};" in config
    assert f"tokenizer_svc:{default('tokenizer_svc', 'port')};" in config
    assert "client_header_timeout" in config
    assert "proxy_buffering off;" in config


def kubernetes(kind: str) -> list[dict[str, Any]]:
    names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    documents = [d for name in names for d in yaml.safe_load_all((KUBERNETES / name).read_text())]
    return [document for document in documents if document["kind"] == kind]


@pytest.mark.parametrize(
    "deployment", kubernetes("Deployment"), ids=lambda d: d["metadata"]["name"]
)
def test_kubernetes_is_true_to_the_settings(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings are accepted, ports are those of the service, and it may drain before it dies."""
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    service = container["name"].replace("-", "_")
    environment = {pair["name"]: pair["value"] for pair in container["env"]}
    settings: Any = read_settings(
        service, {**dockerfile_environment(service), **environment}, monkeypatch
    )
    drains = settings.drain_notice_seconds + settings.drain_seconds
    ports = [port["containerPort"] for port in container["ports"]]

    assert container["image"] == f"trivium-{container['name']}"
    assert ports == [int(port) for port in last(service, "EXPOSE").split()]
    assert pod["terminationGracePeriodSeconds"] > drains + LAST_WORDS_SECONDS
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert deployment["spec"]["selector"]["matchLabels"] == {"app": container["name"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        (asked,) = (value for value in container[probe].values() if isinstance(value, dict))
        assert asked["port"] == settings.port
    if isinstance(settings, FacadeSettings):
        assert not settings.exposes_without_keys()


def test_kubernetes_patches_what_is_there() -> None:
    """The GPU overlay's paths name the variables that it means to replace."""
    overlay = yaml.safe_load((KUBERNETES / "gpu" / "kustomization.yaml").read_text())
    deployments = {found["metadata"]["name"]: found for found in kubernetes("Deployment")}
    replaced = []
    for patch in overlay["patches"]:
        for step in yaml.safe_load(patch["patch"]):
            index = re.search(r"/env/(\d+)/value$", step["path"])
            if index:
                pod = deployments[patch["target"]["name"]]["spec"]["template"]["spec"]
                replaced.append(pod["containers"][0]["env"][int(index[1])]["name"])

    assert replaced == [
        "TRIVIUM_GENERATOR_MODEL_DIRECTORY",
        "TRIVIUM_GENERATOR_KV_CACHE_BYTES",
        "TRIVIUM_TOKENIZER_MODEL_DIRECTORY",
    ]


@pytest.mark.parametrize("service", kubernetes("Service"), ids=lambda s: s["metadata"]["name"])
def test_kubernetes_services_find_their_pods(service: dict[str, Any]) -> None:
    """A service selects the deployment of its name; the gRPC ones show every pod to callers."""
    name = service["metadata"]["name"]

    assert service["spec"]["selector"] == {"app": name}
    assert (service["spec"].get("clusterIP") == "None") == name.endswith("-svc")
