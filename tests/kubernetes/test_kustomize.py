"""deploy/kubernetes, rendered by the real kustomize, is valid and matches settings and images."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rest_facade.config import FacadeSettings
from tests.images import (
    FINAL_ERRORS_SECONDS,
    dockerfile,
    dockerfile_environment,
    last,
    read_settings,
)
from tests.kubernetes.manifests import (
    DIGEST,
    KUBERNETES,
    NEWEST,
    OLDEST,
    ROOT,
    Manifest,
    build,
    containers,
    documented,
    environment,
    faults,
    find,
    of_kind,
    overlay,
    pods,
    selects,
    written,
)
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend
from tests.rest_facade.test_facade_process import running

SCALED = ("overlays/cpu", "overlays/gpu")  # each stage has its own pods
POOL = "overlays/inference-pool"
SERVING = (*SCALED, POOL)
EXPORTS = {"export": "overlays/cpu", "export-gpu": "overlays/gpu"}
COMPONENTS = ("gateway", "hpa", "keda", "pod-monitor", "stage-keys", "tls")
NAMES = ("generator-svc", "tokenizer-svc", "rest-facade")
UNITS = {"Mi": 2**20, "Gi": 2**30}
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def size(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def test_every_kustomization_is_checked() -> None:
    """No folder is left out except the base, which names no model."""
    folders = {
        str(path.parent.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("kustomization.yaml")
    }

    assert {
        *SERVING,
        *EXPORTS,
        *(f"components/{name}" for name in COMPONENTS),
        "base",
    } == folders


@pytest.mark.parametrize(
    "folders",
    [*((name,) for name in (*SERVING, *EXPORTS)), *((SCALED[0], name) for name in COMPONENTS)],
    ids="+".join,
)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_are_valid(folders: tuple[str, ...], version: str) -> None:
    """Every manifest fits its kind's schema, in old and new clusters."""
    manifests = build(*folders)

    assert manifests
    assert [] == faults(manifests, version)


@pytest.mark.parametrize(
    "kind", ["Service", "HorizontalPodAutoscaler", "ScaledObject", "InferencePool", "HTTPRoute"]
)
def test_unknown_fields_are_found(kind: str) -> None:
    """Unknown fields are found in built-in kinds and in extensions."""
    manifests = [*build(SCALED[0], "hpa"), *build(SCALED[0], "keda"), *build(POOL)]
    manifest = json.loads(json.dumps(of_kind(manifests, kind)[0]))
    manifest["spec"]["nonsense"] = 1

    (fault,) = faults([manifest], NEWEST)
    assert "nonsense" in fault


@pytest.mark.parametrize("folder", SERVING)
def test_a_second_apply_changes_no_immutable_field(folder: str) -> None:
    """None of them contains a job, whose template would be immutable."""
    manifests = build(folder)

    assert [] == of_kind(manifests, "Job")
    for kind in ("Deployment", "PodDisruptionBudget", "NetworkPolicy"):
        assert (1 if folder == POOL else 3) == len(of_kind(manifests, kind))


@pytest.mark.parametrize("folder", [*SERVING, *EXPORTS])
def test_images_have_the_projects_version(folder: str) -> None:
    """No image is untagged or `latest`, which could differ from pod to pod."""
    images = [
        container["image"]
        for template in pods(build(folder)).values()
        for container in containers(template).values()
    ]

    assert images
    assert {VERSION} == {image.partition(":")[2] for image in images}


def test_an_overlay_can_pin_images_by_digest() -> None:
    """An operator's overlay sets registry and digest once for all containers of an image."""
    name = "trivium-generator-svc"
    registry = f"registry.example.org/{name}"
    manifests = overlay(SCALED[0], images=[{"name": name, "newName": registry, "digest": DIGEST}])
    generator = containers(pods(manifests)["generator-svc"])

    assert {f"{registry}@{DIGEST}"} == {container["image"] for container in generator.values()}


def test_the_documented_overlay_is_valid() -> None:
    """It is valid as a whole, including the model's export."""
    kustomization, *_ = documented()
    for field in ("resources", "components"):
        paths = [path.removeprefix("../deploy/kubernetes/") for path in kustomization[field]]
        kustomization[field] = paths
    manifests = written(kustomization)

    assert [] == faults(manifests, NEWEST)
    assert {"trivium"} == {manifest["metadata"]["namespace"] for manifest in manifests}
    assert {"Job", "Deployment", "ScaledObject", "PodMonitor"} <= {one["kind"] for one in manifests}


def services(folder: str) -> list[tuple[Manifest, Manifest]]:
    """Containers that serve, each with its pod template."""
    return [
        (container, template)
        for template in pods(build(folder)).values()
        for name, container in containers(template).items()
        if name in NAMES
    ]


def settings_of(folder: str, container: Manifest, monkeypatch: pytest.MonkeyPatch) -> Any:
    target = container["image"].partition(":")[0].removeprefix("trivium-")
    target = target.replace("-svc", "_svc").replace("rest-", "rest_")
    variables = {**dockerfile_environment(target), **environment(build(folder), container)}
    assert target in dockerfile()
    return read_settings(container["name"].replace("-", "_"), variables, monkeypatch)


@pytest.mark.parametrize("folder", SERVING)
@pytest.mark.parametrize("name", NAMES)
def test_settings_ports_and_probes_fit_the_services(
    folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their settings are accepted, and ports and probes are the service's."""
    ((container, template),) = (one for one in services(folder) if one[0]["name"] == name)
    settings = settings_of(folder, container, monkeypatch)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    assert set(ports.values()) == {settings.port, settings.metrics_port}
    assert settings.metrics_port == ports["metrics"]
    exposed = last(name.replace("-", "_"), "EXPOSE").split()
    assert {int(port) for port in exposed} <= set(ports.values())
    scraped = template["metadata"]["annotations"]["prometheus.io/port"]
    assert scraped in {str(one["ports"][1]["containerPort"]) for one, _ in services(folder)}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        (asked,) = (value for value in container[probe].values() if isinstance(value, dict))
        assert asked["port"] == settings.port
        # Longer than the service's own health timeout.
        assert container[probe]["timeoutSeconds"] > getattr(settings, "health_timeout_seconds", 1)
    if isinstance(settings, FacadeSettings):
        assert settings.is_guarded
    else:
        assert str(settings.model_directory).startswith("/models/")


@pytest.mark.parametrize("folder", SCALED)
@pytest.mark.parametrize("name", NAMES)
def test_the_grace_period_covers_the_drain(
    folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notice period replaces a preStop hook, and is long enough for endpoints to be updated."""
    ((container, template),) = (one for one in services(folder) if one[0]["name"] == name)
    settings = settings_of(folder, container, monkeypatch)
    drains = settings.drain_notice_seconds + settings.drain_seconds

    assert template["spec"]["terminationGracePeriodSeconds"] > drains + FINAL_ERRORS_SECONDS
    assert settings.drain_notice_seconds >= 5
    assert "lifecycle" not in container


def test_an_all_in_one_pod_drains_the_facade_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars are stopped after the facade, in reverse order, with enough time for all."""
    (template,) = pods(build(POOL)).values()
    stages = [container for container, _ in services(POOL)]
    facade = template["spec"]["containers"]
    settings = [settings_of(POOL, container, monkeypatch) for container in stages]
    first = settings[2].drain_notice_seconds + settings[2].drain_seconds

    assert list(NAMES) == [container["name"] for container in stages]
    assert stages[2:] == facade
    assert ["Always", "Always"] == [container["restartPolicy"] for container in stages[:2]]
    assert [0, 0] == [one.drain_notice_seconds for one in settings[:2]]
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert grace > first + 3 * FINAL_ERRORS_SECONDS


@pytest.mark.parametrize("folder", [*SERVING, *EXPORTS])
def test_pods_have_no_privileges(folder: str) -> None:
    """Pods are non-root, without a token, and write only to volumes, for /tmp and the models."""
    for template in pods(build(folder)).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert {"type": "RuntimeDefault"} == spec["securityContext"]["seccompProfile"]
        assert not spec["automountServiceAccountToken"]
        mounted = set()
        for container in containers(template).values():
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            mounted |= set(mounts.values())
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "/tmp" in mounts or container["name"] == "wait-for-model"
            assert size(container["resources"]["limits"]["memory"]) >= size(
                container["resources"]["requests"]["memory"]
            )
        assert mounted == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("folder", SCALED)
@pytest.mark.parametrize("name", NAMES)
def test_services_select_their_pods(folder: str, name: str) -> None:
    """A service selects the pods with its name; the gRPC ones are headless."""
    service = find(build(folder), "Service", name)["spec"]
    deployment = find(build(folder), "Deployment", name)["spec"]
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
def test_stages_call_the_next_stage_by_name(folder: str) -> None:
    """They use names that gRPC resolves to all pods, or loopback within a pod."""
    for caller, variable, callee in (
        ("rest-facade", "TRIVIUM_FACADE_TOKENIZER_TARGET", "tokenizer-svc"),
        ("tokenizer-svc", "TRIVIUM_TOKENIZER_GENERATOR_TARGET", "generator-svc"),
    ):
        found = {container["name"]: container for container, _ in services(folder)}
        port = found[callee]["ports"][0]["containerPort"]
        host = "127.0.0.1" if folder == POOL else f"dns:///{callee}"

        assert f"{host}:{port}" == environment(build(folder), found[caller])[variable]
        if folder != POOL:
            assert port == find(build(folder), "Service", callee)["spec"]["ports"][0]["port"]


@pytest.mark.parametrize("folder", [SCALED[0], POOL])
def test_a_rollout_never_reduces_the_number_of_pods(folder: str) -> None:
    """A new pod is ready and in DNS before an old one is stopped."""
    for manifest in of_kind(build(folder), "Deployment"):
        deployment = manifest["spec"]
        assert {"maxSurge": 1, "maxUnavailable": 0} == deployment["strategy"]["rollingUpdate"]
        assert deployment["minReadySeconds"] > 5
        assert deployment["template"]["spec"]["shareProcessNamespace"]


@pytest.mark.parametrize("folder", SERVING)
def test_nodes_can_be_drained(folder: str) -> None:
    """One pod of each kind may be evicted at a time, even if it is the only one."""
    budgets = [manifest["spec"] for manifest in of_kind(build(folder), "PodDisruptionBudget")]

    for template in pods(build(folder)).values():
        labels = template["metadata"]["labels"]
        (budget,) = (one for one in budgets if selects(one["selector"], labels))
        assert 1 == budget["maxUnavailable"]
        (spread,) = template["spec"]["topologySpreadConstraints"]
        assert selects(spread["labelSelector"], labels)


@pytest.mark.parametrize("folder", SERVING)
def test_usage_records_go_to_standard_output(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the generator and the facade write usage records."""
    written = [
        container["name"]
        for container, _ in services(folder)
        if getattr(settings_of(folder, container, monkeypatch), "usage_log", None) == "-"
    ]

    assert ["generator-svc", "rest-facade"] == written


@pytest.mark.parametrize("folder", SERVING)
def test_stages_without_keys_have_network_policies(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages that allow unauthenticated calls have a network policy; the facade requires keys."""
    policies = [policy["spec"]["podSelector"] for policy in of_kind(build(folder), "NetworkPolicy")]
    open_ones = [
        (container["name"], template["metadata"]["labels"])
        for container, template in services(folder)
        if settings_of(folder, container, monkeypatch).allow_unauthenticated_remote
    ]

    assert ["generator-svc", "tokenizer-svc"] == [name for name, _ in open_ones]
    for _, labels in open_ones:
        assert any(selects(policy, labels) for policy in policies)


@pytest.mark.parametrize(("folder", "served"), EXPORTS.items())
def test_the_exported_model_is_the_one_served(folder: str, served: str) -> None:
    """The volume and the folder are those that the services read."""
    job = find(build(folder), "Job", "trivium-export")["spec"]["template"]["spec"]
    claim = find(build(folder), "PersistentVolumeClaim", "trivium-models")["metadata"]["name"]
    arguments = job["containers"][0]["args"]
    out = arguments[arguments.index("--out") + 1]
    readers = [pods(build(served))[name] for name in ("generator-svc", "tokenizer-svc")]
    directories = [
        value
        for reader in readers
        for container in containers(reader).values()
        for name, value in environment(build(served), container).items()
        if name.endswith("MODEL_DIRECTORY")
    ]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for spec in (job, *(reader["spec"] for reader in readers))
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    ]

    assert [out] * 4 == directories  # of the services and of the containers that wait for the model
    assert [claim] * 3 == claims


@pytest.mark.parametrize("folder", [SCALED[0], POOL])
def test_pods_wait_for_the_model(folder: str, tmp_path: Path) -> None:
    """The init container ends as soon as the model's folder exists, and not before."""
    for template in pods(build(folder)).values():
        started = list(containers(template).values())
        if not any(mount["name"] == "models" for one in started for mount in one["volumeMounts"]):
            continue
        model = tmp_path / template["metadata"]["labels"]["app"]
        wait = subprocess.Popen(
            started[0]["command"],
            env={**os.environ, "MODEL_DIRECTORY": str(model)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert wait.stderr is not None
        assert f"waiting for the model in {model}\n" == wait.stderr.readline()
        assert wait.poll() is None
        exported = tmp_path / "exported"
        exported.mkdir()
        (exported / "genai_config.json").write_text("{}")
        exported.rename(model)

        assert 0 == wait.wait(60)
        wait.stderr.close()


def test_each_model_has_its_own_export_job() -> None:
    """Each model has its own job, as a job's arguments are immutable."""
    names = [job["metadata"]["name"] for name in EXPORTS for job in of_kind(build(name), "Job")]

    assert len(EXPORTS) == len(set(names))


def test_the_gpu_overlay_requests_one_gpu() -> None:
    """It has one GPU, an image with the CUDA libraries, and no second pod waiting for the GPU."""
    deployment = find(build("overlays/gpu"), "Deployment", "generator-svc")["spec"]
    container = containers(deployment["template"])["generator-svc"]

    assert 1 == container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"trivium-generator-svc-cuda:{VERSION}" == container["image"]
    variables = environment(build("overlays/gpu"), container)
    assert "cuda" == variables["TRIVIUM_GENERATOR_DEVICE"]
    assert {"type": "Recreate"} == deployment["strategy"]


@pytest.mark.parametrize("folder", ["overlays/cpu", POOL])
def test_the_generators_memory_limit_covers_its_kv_cache(folder: str) -> None:
    """Besides the KV cache there is 1 GiB for the model's weights, twice, and the rest."""
    (container,) = (one for one, _ in services(folder) if one["name"] == "generator-svc")
    cache = int(environment(build(folder), container)["TRIVIUM_GENERATOR_KV_CACHE_BYTES"])

    assert size(container["resources"]["limits"]["memory"]) >= cache + 2**30
    assert "cpu" in container["resources"]["limits"]  # it determines the number of threads


def _largest_bodies() -> list[bytes]:
    """Bodies of the maximum size whose JSON parses into many or large objects."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from /proc")
async def test_the_facades_memory_limit_covers_a_maximal_request() -> None:
    """Whatever a maximal body contains, the limit is at least twice the peak memory."""
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

    container = containers(pods(build("overlays/cpu"))["rest-facade"])["rest-facade"]
    assert 2**26 < peak < size(container["resources"]["limits"]["memory"]) / 2
