"""Which pods can reach which ports, according to the NetworkPolicies in deploy/kubernetes."""

import pytest

from tests.kubernetes.manifests import Manifest, build, containers, of_kind, pods, selects

PICKER = {"inferencepool": "trivium-epp"}
OWN: dict[str, str] = {}  # labels of the pods' own namespace
INGRESS = {"trivium/http": "allowed"}
CLIENTS = {"trivium/grpc": "allowed"}
MONITORING = {"trivium/metrics": "allowed"}


def reaches(
    manifests: list[Manifest],
    port: int,
    pod: dict[str, str],
    namespace: dict[str, str] | None = None,
) -> set[str]:
    """Pods whose `port` is open to a pod with these labels, in another namespace or in theirs."""
    return {
        name
        for name, template in pods(manifests).items()
        if _is_open(manifests, template["metadata"]["labels"], port, pod, namespace)
    }


def _is_open(
    manifests: list[Manifest],
    target: dict[str, str],
    port: int,
    pod: dict[str, str],
    namespace: dict[str, str] | None,
) -> bool:
    policies = [
        policy["spec"]
        for policy in of_kind(manifests, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], target)
    ]
    # A pod without a policy is open to all.
    return not policies or any(
        {"protocol": "TCP", "port": port} in rule["ports"]
        and any(_is_peer(peer, pod, namespace) for peer in rule["from"])
        for policy in policies
        for rule in policy["ingress"]
    )


def _is_peer(peer: Manifest, pod: dict[str, str], namespace: dict[str, str] | None) -> bool:
    """A podSelector without a namespaceSelector means pods in the policy's namespace."""
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], OWN if namespace is None else namespace):
            return False
    elif namespace is not None:
        return False
    return selects(peer.get("podSelector", {}), pod)


def open_ports(
    manifests: list[Manifest], pod: dict[str, str], namespace: dict[str, str] | None = None
) -> dict[str, list[int]]:
    """The ports of each pod that the given pod can reach."""
    ports = {
        port["containerPort"]
        for template in pods(manifests).values()
        for container in containers(template).values()
        for port in container.get("ports", ())
    }
    found: dict[str, list[int]] = {}
    for port in sorted(ports):
        for name in reaches(manifests, port, pod, namespace):
            found.setdefault(name, []).append(port)
    return found


@pytest.mark.parametrize(
    ("pod", "namespace", "ports"),
    [
        ({"app": "nginx"}, INGRESS, {"rest-facade": [8000]}),
        ({"app": "assistant"}, CLIENTS, {"tokenizer-svc": [50051]}),
        (
            {"app": "prometheus"},
            MONITORING,
            {"rest-facade": [9050], "tokenizer-svc": [9051], "generator-svc": [9052]},
        ),
        ({"app": "rest-facade"}, None, {"tokenizer-svc": [50051]}),
        ({"app": "tokenizer-svc"}, None, {"generator-svc": [50052]}),
        ({"app": "generator-svc"}, None, {}),
        ({"app": "anything"}, None, {}),
        ({"app": "anything"}, {}, {}),
        # A pod in another namespace gets no access by using our labels.
        ({"app": "rest-facade"}, {}, {}),
        ({"app": "tokenizer-svc"}, CLIENTS, {"tokenizer-svc": [50051]}),
    ],
)
@pytest.mark.parametrize("folder", ["overlays/cpu", "overlays/gpu"])
def test_a_stage_is_open_to_the_previous_stage(
    folder: str, pod: dict[str, str], namespace: dict[str, str] | None, ports: dict[str, list[int]]
) -> None:
    """It is also open to namespaces with the label for a port, and to no others."""
    assert ports == open_ports(build(folder), pod, namespace)


@pytest.mark.parametrize(
    ("pod", "namespace", "ports"),
    [
        ({"app": "gateway"}, INGRESS, [8000]),
        ({"app": "prometheus"}, MONITORING, [9050, 9051, 9052]),
        (PICKER, None, [9050, 9051, 9052]),
        ({"app": "assistant"}, CLIENTS, []),
        ({"app": "trivium"}, None, []),
        (PICKER, {}, []),
    ],
)
def test_an_all_in_one_pod_is_open_to_gateway_and_picker(
    pod: dict[str, str], namespace: dict[str, str] | None, ports: list[int]
) -> None:
    """Its gRPC ports are closed to all."""
    expected = {"trivium": ports} if ports else {}

    assert expected == open_ports(build("overlays/inference-pool"), pod, namespace)
