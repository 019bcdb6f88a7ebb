"""A real Prometheus scrapes replicas under load, with the alerts and the dashboard that we ship."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.prometheus import Prometheus, installed, lint
from tests.prometheus_lint import is_accepted
from tests.rollout.fleet import FACADE, GENERATOR, TOKENIZER, Fleet
from tests.rollout.load import Load, loaded
from tests.test_monitoring import FOLDER, PANELS, RULES
from tests.tiny_models import tiny_model_directory

A, B = "127.0.0.2", "127.0.0.3"


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two replicas of each stage, with so few slots that requests have to wait."""
    installed("prometheus")
    with Fleet(tiny_model_directory(), tmp_path) as fleet:
        for stage in (GENERATOR, TOKENIZER, FACADE):
            fleet.publish(stage, A, B)
        await fleet.start(GENERATOR, A, B, TRIVIUM_GENERATOR_SLOTS=2)
        await fleet.start(TOKENIZER, A, B)
        await fleet.start(FACADE, A, B, TRIVIUM_FACADE_DRAIN_NOTICE_SECONDS=5)
        await fleet.until_known(GENERATOR, A, B)
        yield fleet


def targets(fleet: Fleet) -> dict[str, list[str]]:
    """The addresses of each stage's metrics, by job."""
    ports = {
        GENERATOR: fleet.ports.generator_metrics,
        TOKENIZER: fleet.ports.tokenizer_metrics,
        FACADE: fleet.ports.facade,
    }
    return {stage: [f"{host}:{port}" for host in (A, B)] for stage, port in ports.items()}


def refused(url: str) -> None:
    """Sends a request without messages."""
    assert 400 == httpx.post(f"{url}/v1/chat/completions", json={"model": "any"}).status_code


def scraped(fleet: Fleet) -> list[str]:
    """The metrics of all replicas."""
    addresses = [address for found in targets(fleet).values() for address in found]
    return [httpx.get(f"http://{address}/metrics").text for address in addresses]


async def lose_generators(fleet: Fleet, load: Load, seen: Prometheus, since: float) -> None:
    """Kills one repeatedly, until calls have been retried and streams have broken off."""
    counted = ("trivium_replica_retries_total", "trivium_http_stream_errors_total")
    while not all(any(seen.values(f"sum({name})", since)) for name in counted):
        await fleet.kill(GENERATOR, A)
        await load.more(40)
        await fleet.start(GENERATOR, A, TRIVIUM_GENERATOR_SLOTS=2)
        await fleet.until_known(GENERATOR, A)
        await load.more(40)


async def test_every_panel_has_data(fleet: Fleet, tmp_path: Path) -> None:
    """After requests that waited, were refused, broke off or were retried, and with a draining
    facade, each panel of the dashboard shows a value above zero, and a graph for each of its
    queries; all rules are evaluated, and promtool's checks pass for every scrape."""
    since = time.time()
    with Prometheus(tmp_path, targets(fleet), FOLDER / "alerts.yaml") as seen:
        await asyncio.to_thread(seen.until_it_scrapes, 6)
        facades = [fleet.url(A), fleet.url(B)]
        async with loaded(fleet.model.name, facades, clients=8) as load:
            await asyncio.to_thread(refused, fleet.url(A))
            await lose_generators(fleet, load, seen, since)
            scrapes = await asyncio.to_thread(scraped, fleet)
            fleet.signal(FACADE, B, signal.SIGTERM)
            await fleet.ended(FACADE, B)
        shown = {panel["title"]: graphs(seen, panel, fleet.model.name, since) for panel in PANELS}
        rules = seen.ask("rules")["groups"][0]["rules"]
        models = seen.ask("label/model_name/values", **{"match[]": "vllm:num_requests_running"})
        pending = seen.values('ALERTS{alertname="TriviumReplicaUnreachable"}', since)

    assert [] == [title for title, found in shown.items() if not all(found)]
    assert [] == [title for title, found in shown.items() if not max(map(max, found))]
    assert [fleet.model.name] == models
    assert {(rule["alert"], "ok") for rule in RULES} == {
        (rule["name"], rule["health"]) for rule in rules
    }
    assert pending
    assert set() == {fault for text in scrapes for fault in lint(text) if not is_accepted(*fault)}


def graphs(seen: Prometheus, panel: Any, model: str, since: float) -> list[list[float]]:
    """What Grafana would plot for each query of a panel, with the variables filled in."""
    return [
        seen.values(
            target["expr"].replace("$__rate_interval", "4s").replace("$model", model), since
        )
        for target in panel["targets"]
    ]
