"""deploy/helm/trivium, rendered by Helm's engine: valid and equivalent to deploy/kubernetes."""

import re
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from tests.certificates import Files
from tests.images import dockerfile_environment, read_settings
from tests.kubernetes.manifests import (
    DIGEST,
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
    pods,
)
from tests.kubernetes.mounts import variables_in

helm = pytest.importorskip("helm_python", reason="no wheel of Helm's engine for this platform")

CHART = ROOT / "deploy" / "helm" / "trivium"
GPU: dict[str, Any] = yaml.safe_load((CHART / "values-gpu.yaml").read_text())
STAGE_KEYS: dict[str, Any] = {"apiKeys": {"stages": {"enabled": True}}}
MUTUAL_TLS: dict[str, Any] = {"tls": {"grpc": "mutual"}}
EVERYTHING: dict[str, Any] = {
    "imageRegistry": "registry.example.org/llm/",
    "imagePullSecrets": [{"name": "pull"}],
    "model": {"export": {"enabled": True, "tokenSecretName": "hub", "storageClassName": "nfs"}},
    "generator": {"nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}]},
    "autoscaling": {"type": "hpa"},
    "podMonitor": {"enabled": True},
    **STAGE_KEYS,
    "tls": {"grpc": "mutual", "rest": "mutual"},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "host": "llm.example.org",
        "tlsSecretName": "tls",
        "annotations": {"a/b": "c"},
    },
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["example.org"]},
}


def render(values: dict[str, Any], release: str = "release") -> list[Manifest]:
    """What `helm install RELEASE` would send."""
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values, name=release, namespace="default")
    return [
        document
        for name, text in rendered.items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def plain(manifests: list[Manifest]) -> dict[tuple[str, str], Any]:
    """Manifests by kind and name, without what is specific to Helm or kustomize.

    Helm prefixes names with the release; kustomize has the model's folder in a ConfigMap. The order
    of volumes does not matter.
    """
    found = {}
    for manifest in yaml.safe_load(re.sub(r"\brelease-", "", yaml.safe_dump(manifests))):
        template = manifest["spec"].get("template") if "spec" in manifest else None
        if template:
            for container in containers(template).values():
                if "env" in container:
                    optional = [one for one in container["env"] if "secretKeyRef" in str(one)]
                    container["env"] = (environment(manifests, container), optional)
                container["volumeMounts"].sort(key=itemgetter("mountPath"))
            template["spec"]["volumes"].sort(key=itemgetter("name"))
        for place in (manifest, template or {}):
            labels = place.get("metadata", {}).get("labels", {})
            for label in [label for label in labels if "/" in label]:
                del labels[label]
        kind = manifest["kind"]
        found[kind, manifest["metadata"]["name"]] = {
            key: value for key, value in manifest.items() if key != "metadata"
        }
    return {key: value for key, value in found.items() if key[0] != "ConfigMap"}


@pytest.mark.parametrize(
    ("values", "folders"),
    [
        ({}, ("overlays/cpu",)),
        (GPU, ("overlays/gpu",)),
        ({"autoscaling": {"type": "hpa"}}, ("overlays/cpu", "hpa")),
        ({"autoscaling": {"type": "keda"}}, ("overlays/cpu", "keda")),
        (
            {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]}},
            ("overlays/cpu", "gateway"),
        ),
        (STAGE_KEYS, ("overlays/cpu", "stage-keys")),
        ({**GPU, **MUTUAL_TLS}, ("overlays/gpu", "tls")),
        ({**STAGE_KEYS, **MUTUAL_TLS}, ("overlays/cpu", "stage-keys", "tls")),
    ],
    ids=["cpu", "gpu", "hpa", "keda", "gateway", "keys", "tls", "keys-tls"],
)
def test_chart_and_kustomize_render_the_same_manifests(
    values: dict[str, Any], folders: tuple[str, ...]
) -> None:
    """Every field of every manifest is equal, but the chart's queries name the namespace."""
    ours = yaml.safe_dump(render(values)).replace('namespace="default",', "")

    assert plain(build(*folders)) == plain(yaml.safe_load(ours))


@pytest.mark.parametrize(("extra", "folder"), [({}, "export"), (GPU, "export-gpu")])
def test_chart_and_kustomize_render_the_same_export_job(extra: dict[str, Any], folder: str) -> None:
    """The job and its volume are the same."""
    model = extra.get("model", {})
    export = {**model.get("export", {}), "enabled": True}
    manifests = render({**extra, "model": {**model, "export": export}})
    job, other = (find(one, "Job", "")["spec"] for one in (manifests, build(folder)))
    claim, wanted = (
        find(one, "PersistentVolumeClaim", "trivium-models")["spec"]
        for one in (manifests, build(folder))
    )

    assert wanted == claim
    assert other["template"]["spec"] == job["template"]["spec"]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("autoscaler", ["hpa", "keda"])
def test_all_optional_parts_together_are_valid(version: str, autoscaler: str) -> None:
    """All optional parts together fit their kinds' schemas."""
    manifests = render({**EVERYTHING, "autoscaling": {"type": autoscaler}})

    assert [] == faults(manifests, version)
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds >= {"Ingress", "HTTPRoute", "PodMonitor", "Job", "PersistentVolumeClaim"}


def test_the_documented_values_are_valid() -> None:
    """They are valid, and the exported model is the one served."""
    _, values, _ = documented()
    manifests = render(values)
    (job,) = of_kind(manifests, "Job")
    (export,) = job["spec"]["template"]["spec"]["containers"]

    assert [] == faults(manifests, NEWEST)
    assert "Qwen/Qwen2.5-7B-Instruct" == export["args"][0]
    assert "/models/qwen2.5-7b" in export["args"]


def test_helm_lint_finds_no_problems() -> None:
    """It only recommends an icon."""
    report = helm.lint(CHART, strict=True)

    assert ["icon is recommended"] == [message["error"] for message in report["messages"]]


def test_the_chart_has_the_projects_version() -> None:
    """Its images are those of its own release."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)

    assert (version, version) == (chart["version"], chart["appVersion"])


def test_images_can_be_pinned_by_digest() -> None:
    """A digest takes precedence over a tag, in all containers of an image."""
    image = {"tag": "1.2.3", "digest": DIGEST}
    manifests = render({"imageRegistry": "r.example.org/", "generator": {"image": image}})
    generator = containers(pods(manifests)["release-generator-svc"])

    assert {f"r.example.org/trivium-generator-svc@{DIGEST}"} == {
        container["image"] for container in generator.values()
    }


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"generator": {"replica": 2}}, "'replica' not allowed"),
        ({"facade": {"replicas": 0}}, "/facade/replicas"),
        ({"facade": {"image": {"tag": "latest"}}}, "/facade/image/tag"),
        ({"tokenizer": {"image": {"digest": "sha256:1"}}}, "/tokenizer/image/digest"),
        ({"model": {"directory": "my-model"}}, "/model/directory"),
        ({"autoscaling": {"type": "vpa"}}, "'none', 'hpa', 'keda'"),
        ({"httpRoute": {"enabled": True}}, "/httpRoute/parentRefs"),
        ({"tls": {"grpc": "on"}}, "'none', 'tls', 'mutual'"),
        ({"tls": {"secretNames": {"facade": ""}}}, "/tls/secretNames/facade"),
        ({"apiKeys": {"stages": {"enable": True}}}, "'enable' not allowed"),
        ({"generator": {"env": {"slots": "8"}}}, "'slots' not allowed"),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], told: str) -> None:
    """The error names the value."""
    with pytest.raises(helm.HelmValuesError) as refused:
        render(values)

    assert told in str(refused.value)


def test_a_release_name_that_is_too_long_is_refused() -> None:
    """Up to 47 characters all names fit, including the job's; a longer one is refused."""
    names = [manifest["metadata"]["name"] for manifest in render(EVERYTHING, "r" * 47)]
    with pytest.raises(helm.HelmError, match="47 characters"):
        render({}, "r" * 48)

    assert 63 == max(map(len, names))


def test_selectors_of_two_releases_do_not_overlap() -> None:
    """No selector of one release matches the other's pods in the same namespace."""
    one, other = render(EVERYTHING, "one"), render(EVERYTHING, "other")
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in one}
    # They share the volume with the models.
    shared = names & {(manifest["kind"], manifest["metadata"]["name"]) for manifest in other}

    assert {("PersistentVolumeClaim", "trivium-models")} == shared
    labels = [template["metadata"]["labels"] for template in pods(other).values()]
    for selector in selectors(one):
        assert not any(selector.items() <= of_pod.items() for of_pod in labels)


def selectors(value: Any) -> list[dict[str, str]]:
    """All label selectors of pods in a manifest, without namespace selectors."""
    if isinstance(value, list):
        return [found for one in value for found in selectors(one)]
    if not isinstance(value, dict):
        return []
    found = [
        found
        for key, one in value.items()
        if key != "namespaceSelector"
        for found in selectors(one)
    ]
    if "matchLabels" in value:
        found.append(value["matchLabels"])
    elif isinstance(value.get("selector"), dict) and "matchLabels" not in value["selector"]:
        found.append(value["selector"])
    return found


def test_another_model_gets_another_export_job() -> None:
    """A job's arguments are immutable, so its name depends on them, and on nothing else."""

    def name(**export: Any) -> str:
        manifests = render({"model": {"export": {"enabled": True, **export}}})
        return str(find(manifests, "Job", "release-export-")["metadata"]["name"])

    assert name() == name(storage="20Gi")
    assert 3 == len({name(), name(args=["--precision", "int4"]), name(image={"tag": "2.0.0"})})


def test_a_longer_drain_has_a_longer_grace_period() -> None:
    """The grace period and the services' drain times come from the same values."""
    manifests = render({"drain": {"noticeSeconds": 15, "seconds": 600}})

    for template in pods(manifests).values():
        assert 625 == template["spec"]["terminationGracePeriodSeconds"]
        (container,) = template["spec"]["containers"]
        drains = [value for name, value in variables(container).items() if "_DRAIN_" in name]
        assert ["15", "600"] == drains


def variables(container: Manifest) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


@pytest.mark.parametrize(
    ("values", "guards"),
    [
        (STAGE_KEYS, {"API_KEYS_FILE"}),
        ({"tls": {"grpc": "mutual"}}, {"TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE"}),
        # Clients need no certificate, so the network policy has to protect the port.
        (
            {"tls": {"grpc": "tls"}},
            {"TLS_CERT_FILE", "TLS_KEY_FILE", "ALLOW_UNAUTHENTICATED_REMOTE"},
        ),
        (
            {"tls": {"grpc": "tls"}, **STAGE_KEYS},
            {"TLS_CERT_FILE", "TLS_KEY_FILE", "API_KEYS_FILE"},
        ),
    ],
    ids=["keys", "mutual", "tls", "keys-tls"],
)
def test_grpc_ports_use_the_configured_authentication(
    values: dict[str, Any], guards: set[str]
) -> None:
    """Unauthenticated calls are allowed only if neither keys nor client certificates are used."""
    found = set(
        variables(containers(pods(render(values))["release-generator-svc"])["generator-svc"])
    )
    kinds = ("_API_KEY", "_TLS_", "_ALLOW_")

    assert {f"TRIVIUM_GENERATOR_{guard}" for guard in guards} == {
        name for name in found if any(kind in name for kind in kinds)
    }


@pytest.mark.parametrize("kind", ["tls", "mutual"])
def test_rest_over_tls(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The facade reads its mounted certificate; probes, ingress and route use the right port."""
    values = {**EVERYTHING, "apiKeys": {}, "tls": {"grpc": "none", "rest": kind}}
    manifests = render(values)
    template = pods(manifests)["release-rest-facade"]
    container = containers(template)["rest-facade"]
    Files(tmp_path / "trivium-rest-tls").write(trustme.CA())
    (tmp_path / "trivium-api-keys").mkdir()
    found = variables_in(tmp_path, manifests, template, container)
    image = dockerfile_environment("rest_facade")
    settings: Any = read_settings("rest_facade", {**image, **found}, monkeypatch)

    assert settings.server_tls() is not None
    assert (kind == "mutual") == settings.authenticates_clients_by_tls
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert settings.metrics_port == container[probe]["httpGet"]["port"]
        assert container[probe]["httpGet"]["path"] in ("/healthz", "/livez")
    (port,) = find(manifests, "Service", "release-rest-facade")["spec"]["ports"]
    assert ("https", 443, settings.port) == (port["name"], port["port"], port["targetPort"])
    (rule,) = find(manifests, "Ingress", "release")["spec"]["rules"]
    assert {"name": "https"} == rule["http"]["paths"][0]["backend"]["service"]["port"]
    (rule,) = find(manifests, "HTTPRoute", "release")["spec"]["rules"]
    assert 443 == rule["backendRefs"][0]["port"]


def test_any_setting_can_be_set() -> None:
    """Settings have their own names, and values are text whatever YAML parses them as."""
    env = {"TRIVIUM_GENERATOR_SLOTS": 8, "TRIVIUM_GENERATOR_PREFIX_CACHE": False}
    manifests = render({"generator": {"env": env}})
    container = containers(pods(manifests)["release-generator-svc"])["generator-svc"]

    assert "8" == variables(container)["TRIVIUM_GENERATOR_SLOTS"]
    assert "false" == variables(container)["TRIVIUM_GENERATOR_PREFIX_CACHE"]


def test_large_numbers_are_written_out() -> None:
    """Without an exponent, which a setting that is an integer would refuse."""
    env = {"A": 104857600, "B": 12345678901, "C": 16, "D": 0.25, "E": -1, "F": "8e6"}
    manifests = render({"facade": {"env": env}})
    container = containers(pods(manifests)["release-rest-facade"])["rest-facade"]

    assert {name: str(value) for name, value in env.items()}.items() <= variables(container).items()


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({}, True),
        ({"apiKeys": {"stages": {"enabled": True}}}, False),
        ({"tls": {"grpc": "mutual"}}, False),
        ({"networkPolicy": {"enabled": False}}, False),
    ],
)
def test_notes_warn_if_network_policies_are_relied_on(values: dict[str, Any], warned: bool) -> None:
    """The notes warn that not every cluster enforces them."""
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="release", namespace="default")
    [notes] = [text for name, text in rendered.items() if name.endswith("NOTES.txt")]

    assert warned == ("does not enforce network policies" in notes)


def test_network_policies_can_be_disabled() -> None:
    """A cluster may have its own policies; stages without keys then need explicit permission."""
    manifests = render({"networkPolicy": {"enabled": False}})

    assert [] == of_kind(manifests, "NetworkPolicy")
    assert "ALLOW_UNAUTHENTICATED_REMOTE" not in str(manifests)
    assert "ALLOW_UNAUTHENTICATED_REMOTE" in str(render({}))
