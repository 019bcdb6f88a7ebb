"""Keys and mutual TLS between the stages, with the secrets that kustomize's components mount."""

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
    """A folder with those that an operator makes, certificates by one CA."""
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
    """Of a service's container, with its secrets where they are here."""
    manifests = build(*folders)
    template = pods(manifests)[service]
    return variables_in(secrets, manifests, template, containers(template)[service])


@pytest.mark.parametrize("folder", SCALED)
@pytest.mark.parametrize("components", [(KEYS,), (TLS,), (KEYS, TLS)], ids="+".join)
@pytest.mark.parametrize("service", STAGES)
def test_ports_are_guarded(
    folder: str,
    components: tuple[str, ...],
    service: str,
    secrets: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By keys, by certificates or by both; nobody gets in because it is said that all may."""
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
def test_probes_ask_ports_without_tls(
    service: str, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of gRPC know no TLS; the metrics ports answer the same over HTTP."""
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


def test_stages_see_their_own_key_alone(secrets: Path) -> None:
    """The facade's pod has not the tokenizer's key, the generator's pod has none."""
    for service, key in (("rest-facade", "facade"), ("tokenizer-svc", "tokenizer")):
        spec = pods(build(*BOTH))[service]["spec"]
        (volume,) = (one for one in spec["volumes"] if one["name"] == "stage-key")
        assert [{"key": key, "path": key}] == volume["secret"]["items"]
    generator = secrets_of(pods(build(*BOTH))["generator-svc"])
    assert {"trivium-api-keys", "trivium-generator-tls"} == set(generator.values())


def test_the_documented_certificate_is_the_tokenizers() -> None:
    """It has the name by which facades call, in the secret that is mounted."""
    _, _, certificate = documented()
    spec = certificate["spec"]
    template = pods(build(*BOTH))["tokenizer-svc"]

    assert spec["secretName"] == secrets_of(template)["tls"]
    name = find(build(*BOTH), "Service", "tokenizer-svc")["metadata"]["name"]
    assert [name] == spec["dnsNames"]
    assert ["server auth", "client auth"] == spec["usages"]


@pytest.mark.timeout(600)
def test_a_request_passes_all_stages(secrets: Path) -> None:
    """The services run with the variables of their pods; only addresses are those of this machine.

    Servers have to have the certificate for the name in the pods' targets.
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
