"""Keys and mutual TLS between stages, with the secrets mounted by kustomize's components."""

import hashlib
import urllib.request
from pathlib import Path

import pytest
import trustme

from tests.certificates import Files
from tests.images import dockerfile_environment, read_settings
from tests.kubernetes.manifests import build, containers, documented, find, pods
from tests.kubernetes.mounts import secrets_of, variables_in
from tests.pipeline.services import Services
from tests.tiny_models import tiny_model_directory

KEYS, TLS = "stage-keys", "tls"
STAGES = {
    "rest-facade": "trivium-facade-tls",
    "tokenizer-svc": "trivium-tokenizer-tls",
    "generator-svc": "trivium-generator-tls",
}
SCALED = ("overlays/cpu", "overlays/gpu")
BOTH = (SCALED[0], KEYS, TLS)
CLIENT_KEY = "client"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with the secrets that an operator creates, with certificates from one CA."""
    ca = trustme.CA()
    for service, secret in STAGES.items():
        Files(tmp_path / secret).write(ca, names=(service,))
    keys = {"facade": "stage = true", "tokenizer": "stage = true", CLIENT_KEY: ""}
    text = ""
    for key, more in keys.items():
        text += f'[keys.{key}]\ndigest = "{hashlib.sha256(key.encode()).hexdigest()}"\n{more}\n'
    (tmp_path / "trivium-api-keys").mkdir()
    (tmp_path / "trivium-api-keys" / "digests").write_text(text)
    (tmp_path / "trivium-stage-keys").mkdir()
    for stage in ("facade", "tokenizer"):
        (tmp_path / "trivium-stage-keys" / stage).write_text(stage)
    return tmp_path


def variables(secrets: Path, folders: tuple[str, ...], service: str) -> dict[str, str]:
    """The variables of a service's container, with paths to its secrets replaced by local ones."""
    manifests = build(*folders)
    template = pods(manifests)[service]
    return variables_in(secrets, manifests, template, containers(template)[service])


@pytest.mark.parametrize("folder", SCALED)
@pytest.mark.parametrize("components", [(KEYS,), (TLS,), (KEYS, TLS)], ids="+".join)
@pytest.mark.parametrize("service", STAGES)
def test_every_port_is_authenticated(
    folder: str,
    components: tuple[str, ...],
    service: str,
    secrets: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ports need keys, certificates or both; no setting allows unauthenticated calls."""
    target = service.replace("-", "_")
    found = variables(secrets, (folder, *components), service)
    settings = read_settings(target, {**dockerfile_environment(target), **found}, monkeypatch)

    assert settings.is_guarded  # type: ignore[attr-defined]
    assert not settings.allow_unauthenticated_remote  # type: ignore[attr-defined]
    if service != "rest-facade":
        has_keys = settings.api_keys_file is not None  # type: ignore[attr-defined]
        is_mutual = settings.authenticates_clients_by_tls  # type: ignore[attr-defined]
        assert (KEYS in components, TLS in components) == (has_keys, is_mutual)


@pytest.mark.parametrize("service", STAGES)
def test_probes_use_ports_without_tls(
    service: str, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC probes do not support TLS; the metrics ports give the same answers over HTTP."""
    target = service.replace("-", "_")
    found = variables(secrets, BOTH, service)
    settings = read_settings(target, {**dockerfile_environment(target), **found}, monkeypatch)
    container = containers(pods(build(*BOTH))[service])[service]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "grpc" not in container[name]
        asked = container[name]["httpGet"]["port"]
        if service == "rest-facade":
            assert settings.port == asked  # type: ignore[attr-defined]
        else:
            assert settings.metrics_port == asked  # type: ignore[attr-defined]


def test_each_stage_has_only_its_own_key(secrets: Path) -> None:
    """The facade's and the tokenizer's pods have only their own keys; the generator's has none."""
    for service, key in (("rest-facade", "facade"), ("tokenizer-svc", "tokenizer")):
        spec = pods(build(*BOTH))[service]["spec"]
        (volume,) = (one for one in spec["volumes"] if one["name"] == "stage-key")
        assert [{"key": key, "path": key}] == volume["secret"]["items"]
    generator = secrets_of(pods(build(*BOTH))["generator-svc"])
    assert {"trivium-api-keys", "trivium-generator-tls"} == set(generator.values())


def test_the_documented_certificate_fits_the_tokenizer() -> None:
    """It has the name that facades call, and goes into the mounted secret."""
    _, _, certificate = documented()
    spec = certificate["spec"]
    template = pods(build(*BOTH))["tokenizer-svc"]

    assert spec["secretName"] == secrets_of(template)["tls"]
    name = find(build(*BOTH), "Service", "tokenizer-svc")["metadata"]["name"]
    assert [name] == spec["dnsNames"]
    assert ["server auth", "client auth"] == spec["usages"]


@pytest.mark.timeout(600)
def test_a_request_passes_all_stages(secrets: Path) -> None:
    """The services run with their pods' variables; only the addresses are this machine's.

    Servers need a certificate for the name in the pods' targets.
    """
    settings: dict[str, str] = {}
    for service in STAGES:
        found = variables(secrets, BOTH, service)
        settings |= {name: value for name, value in found.items() if "KEY" in name or "TLS" in name}
        for name, value in found.items():
            if name.endswith("_TARGET"):
                host = value.removeprefix("dns:///").partition(":")[0]
                settings[name.replace("_TARGET", "_TLS_SERVER_NAME")] = host
    with Services(tiny_model_directory(), secrets, **settings) as services:
        assert "length" == services.finish_reason(CLIENT_KEY)

        pipeline = services.pipeline
        for service, port in (
            ("tokenizer-svc", pipeline.tokenizer_metrics_port),
            ("generator-svc", pipeline.generator_metrics_port),
        ):
            container = containers(pods(build(*BOTH))[service])[service]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                url = f"http://127.0.0.1:{port}{container[probe]['httpGet']['path']}"
                with urllib.request.urlopen(url, timeout=60) as answered:
                    assert 200 == answered.status
