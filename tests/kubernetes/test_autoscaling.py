"""Autoscalers, monitors and routes refer to metrics, ports and services that exist."""

import re
from types import ModuleType
from typing import Any

import promql_parser
import pytest
import yaml

from tests.kubernetes.manifests import (
    ROOT,
    Manifest,
    build,
    containers,
    find,
    of_kind,
    pods,
    selects,
)
from tests.test_monitoring import scraped, walked

CPU = "overlays/cpu"
POOL = "overlays/inference-pool"
AUTOSCALERS = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}
ADAPTER: dict[str, Any] = yaml.safe_load(
    (ROOT / "deploy" / "monitoring" / "prometheus-adapter.yaml").read_text()
)["rules"]
# The metrics that the Gateway API Inference Extension's model server protocol requires, by vLLM's
# names.
PROTOCOL = {
    "vllm:num_requests_waiting": set(),
    "vllm:num_requests_running": set(),
    "vllm:kv_cache_usage_perc": set(),
    "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
}


def series(generate: ModuleType, stage: str) -> dict[str, set[str]]:
    """A stage's series, each with its label names."""
    found: dict[str, set[str]] = {}
    for family in scraped(generate, stage):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def metrics_in(query: str) -> set[str]:
    """The metrics in a query."""
    nodes = walked(promql_parser.parse(query))
    return {str(node.name) for node in nodes if isinstance(node, promql_parser.VectorSelector)}


def adapted() -> dict[str, str]:
    """The pod metrics that prometheus-adapter offers, with the query for each."""
    offered = {}
    for rule in ADAPTER["custom"]:
        name = rule["seriesQuery"].partition("{")[0]
        pattern, replacement = rule["name"].get("matches", ".*"), rule["name"]["as"]
        query = rule["metricsQuery"]
        for placeholder, text in (
            ("<<.Series>>", name),
            ("<<.LabelMatchers>>", 'namespace="a",pod=~"b|c"'),
            ("<<.GroupBy>>", "pod"),
        ):
            query = query.replace(placeholder, text)
        offered[re.sub(f"^{pattern}$", replacement.replace("${1}", r"\1"), name)] = query
    return offered


@pytest.mark.parametrize(("component", "kind"), AUTOSCALERS.items())
def test_every_stage_scales(component: str, kind: str) -> None:
    """Each stage has one autoscaler, and an apply does not reset its number of pods."""
    manifests = build(CPU, component)
    deployments = {one["metadata"]["name"]: one for one in of_kind(manifests, "Deployment")}
    targets = [one["spec"]["scaleTargetRef"]["name"] for one in of_kind(manifests, kind)]

    assert sorted(deployments) == sorted(targets)
    assert not any("replicas" in one["spec"] for one in deployments.values())
    assert all("replicas" in one["spec"] for one in of_kind(build(CPU), "Deployment"))


def test_adapter_metrics_exist_in_the_generator(generate: ModuleType) -> None:
    """prometheus-adapter offers what the autoscaler requests, from series that exist."""
    spec = find(build(CPU, "hpa"), "HorizontalPodAutoscaler", "generator-svc")["spec"]
    wanted = [one["pods"]["metric"]["name"] for one in spec["metrics"]]

    assert wanted == list(adapted())
    for query in adapted().values():
        assert metrics_in(query) <= series(generate, "generator").keys()


def test_keda_queries_the_generators_metrics(generate: ModuleType) -> None:
    """The queries are valid PromQL and select only generator pods."""
    manifests = build(CPU, "keda")
    triggers = find(manifests, "ScaledObject", "generator-svc")["spec"]["triggers"]
    queries = [trigger["metadata"]["query"] for trigger in triggers]

    assert [{"vllm:num_requests_waiting"}, {"trivium_slots_in_use", "trivium_slots"}] == [
        metrics_in(query) for query in queries
    ]
    for query in queries:
        assert metrics_in(query) <= series(generate, "generator").keys()
        for pattern in re.findall(r'pod=~"([^"]+)"', query):
            assert re.fullmatch(pattern, "generator-svc-7d9c5b8f6-x2x4z")
            assert not re.fullmatch(pattern, "tokenizer-svc-7d9c5b8f6-x2x4z")


@pytest.mark.parametrize("folder", [CPU, POOL])
def test_every_pod_is_scraped(folder: str) -> None:
    """The PodMonitor selects all pods, and each service in them has a port with its name."""
    manifests = build(folder, "pod-monitor")
    monitor = find(manifests, "PodMonitor", "trivium")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]

    for template in pods(manifests).values():
        assert selects(monitor["selector"], template["metadata"]["labels"])
        for container in containers(template).values():
            names = [port["name"] for port in container.get("ports", ())]
            assert endpoint["port"] in names or container["name"] == "wait-for-model"


def port_of(template: Manifest, container: str, name: str) -> int:
    (port,) = (
        port["containerPort"]
        for port in containers(template)[container]["ports"]
        if port["name"] == name
    )
    return int(port)


def test_the_inference_pool_selects_pods_and_ports(generate: ModuleType) -> None:
    """It selects the pods, at the facade's port; the picker reads metrics at the generator's."""
    manifests = build(POOL)
    pool = find(manifests, "InferencePool", "trivium")
    (template,) = pods(manifests).values()
    (rule,) = find(manifests, "HTTPRoute", "trivium")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    found = series(generate, "generator")

    assert selects(pool["spec"]["selector"], template["metadata"]["labels"])
    assert [{"number": port_of(template, "rest-facade", "http")}] == pool["spec"]["targetPorts"]
    assert f"{backend['group']}/v1" == pool["apiVersion"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])
    assert {"request": "0s"} == rule["timeouts"]
    assert 9052 == port_of(template, "generator-svc", "metrics")
    for name, labels in PROTOCOL.items():
        assert labels <= found[name]


def test_the_gateway_routes_to_the_facades() -> None:
    """Its route names their service, and does not limit the duration of requests."""
    manifests = build(CPU, "gateway")
    (rule,) = find(manifests, "HTTPRoute", "rest-facade")["spec"]["rules"]
    service = find(manifests, "Service", "rest-facade")
    (port,) = service["spec"]["ports"]

    assert [{"name": service["metadata"]["name"], "port": port["port"]}] == rule["backendRefs"]
    assert {"request": "0s"} == rule["timeouts"]
