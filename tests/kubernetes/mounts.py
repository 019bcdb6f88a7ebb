"""The secrets mounted into a container."""

from pathlib import Path

from tests.kubernetes.manifests import Manifest, environment


def secrets_of(template: Manifest) -> dict[str, str]:
    """Names of a pod's secrets, by volume."""
    return {
        volume["name"]: volume["secret"]["secretName"]
        for volume in template["spec"]["volumes"]
        if "secret" in volume
    }


def variables_in(
    folder: Path, manifests: list[Manifest], template: Manifest, container: Manifest
) -> dict[str, str]:
    """The container's variables, with paths to secrets replaced by local ones: each secret is a
    folder of that name in `folder`. Only mounted secrets are found."""
    found = environment(manifests, container)
    names = secrets_of(template)
    for mount in container["volumeMounts"]:
        if mount["name"] not in names:
            continue
        assert mount["readOnly"]
        (volume,) = (one for one in template["spec"]["volumes"] if one["name"] == mount["name"])
        secret = folder / names[mount["name"]]
        items = volume["secret"].get("items")
        if items is None:
            items = [{"key": path.name, "path": path.name} for path in secret.iterdir()]
        places = {f"{mount['mountPath']}/{one['path']}": str(secret / one["key"]) for one in items}
        found = {name: places.get(value, value) for name, value in found.items()}
    return found
