"""Metrics follow Prometheus' conventions; dashboard and alerts use only metrics that exist."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests import prometheus
from tests.ports import free_port
from tests.prometheus_lint import faults, is_accepted
from trivium.wire.in_flight import InFlight
from trivium.wire.metrics_server import serve_metrics
from trivium.wire.process_metrics import register_process

FOLDER = Path(__file__).parents[1] / "deploy" / "monitoring"
STAGES = ("facade", "tokenizer", "generator")
VLLM = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
    *("prefix_cache_queries", "prefix_cache_hits", "iteration_tokens_total"),
    *("prompt_tokens", "generation_tokens", "request_prompt_tokens", "request_generation_tokens"),
    *("request_success", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds"),
)
# Labels that Prometheus adds to all series.
OF_TARGETS = {"job", "instance"}
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
RULE_TESTS = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
    *((rule["alert"], rule["expr"]) for rule in RULES),
]


def scraped(generate: ModuleType, stage: str) -> list[Metric]:
    """A stage's metrics as Prometheus reads them, each with all its labels."""
    registry = getattr(generate, f"{stage}_registry")()
    list(generate.touched(registry))
    return list(text_string_to_metric_families(generate_latest(registry).decode()))


@pytest.fixture(scope="module")
def labels(generate: ModuleType) -> dict[str, set[str]]:
    """The label names of every series of every stage."""
    found: dict[str, set[str]] = {}
    for stage in STAGES:
        for family in scraped(generate, stage):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def invalid_metrics() -> CollectorRegistry:
    """Two metrics with faults, and one without."""
    registry = CollectorRegistry()
    Gauge("a:fooBar_milliseconds_total", "", registry=registry)
    Gauge("a_gauge_ms", "Text.", ["le"], registry=registry).labels("1")
    Counter("good_seconds", "Text.", registry=registry)
    return registry


def test_lint_finds_faults() -> None:
    """It finds the faults of invalid metrics, in promtool's wording."""
    found = {family.name: list(faults(family)) for family in invalid_metrics().collect()}

    assert {
        "a:fooBar_milliseconds_total": [
            "no help text",
            'non-counter metrics should not have "_total" suffix',
            "metric names should not contain ':'",
            "metric names should be written in 'snake_case' not 'camelCase'",
            'use base unit "seconds" instead of "milliseconds"',
        ],
        "a_gauge_ms": [
            "metric name should not include type 'gauge'",
            "metric names should not contain abbreviated units",
            'non-histogram metrics should not have "le" label',
        ],
        "good_seconds": [],
    } == found


def named_faults(registry: CollectorRegistry) -> set[tuple[str, str]]:
    """The faults that our own lint finds, by metric name as in a scrape."""
    return {
        (f"{family.name}_total" if family.type == "counter" else family.name, fault)
        for family in registry.collect()
        for fault in faults(family)
    }


@pytest.mark.parametrize("of", [*STAGES, "invalid_metrics"])
def test_promtool_and_lint_agree(generate: ModuleType, of: str) -> None:
    """They agree on each stage's metrics, and on invalid ones."""
    registry = invalid_metrics() if of not in STAGES else getattr(generate, f"{of}_registry")()
    list(generate.touched(registry))

    assert named_faults(registry) == prometheus.lint(generate_latest(registry).decode())


@pytest.mark.parametrize("stage", STAGES)
def test_lint_finds_only_accepted_faults(generate: ModuleType, stage: str) -> None:
    """Names and help texts follow Prometheus' conventions, but for vLLM's and exact nanoseconds."""
    found = {
        (family.name, fault) for family in scraped(generate, stage) for fault in faults(family)
    }

    assert [] == [fault for fault in found if not is_accepted(*fault)]


def test_vllm_metrics_come_from_one_stage_only(generate: ModuleType) -> None:
    """A sum over all stages thus counts each request once."""
    names = [
        family.name
        for stage in STAGES
        for family in scraped(generate, stage)
        if family.name.startswith("vllm:")
    ]

    assert len(set(names)) == len(names)
    assert {f"vllm:{name}" for name in VLLM} == set(names)


@pytest.mark.parametrize("stage", STAGES)
def test_every_process_has_process_metrics(generate: ModuleType, stage: str) -> None:
    """It reports its resources, its build, and whether it is draining."""
    names = {family.name for family in scraped(generate, stage)}

    assert names >= {
        "process_cpu_seconds",
        "process_resident_memory_bytes",
        "process_open_fds",
        "trivium_build_info",
        "trivium_drain_state",
    }
    assert [] == [name for name in names if name.endswith("_created")]


def test_the_drain_state_has_one_value_at_a_time() -> None:
    """The state is none, then notice, then drain: always exactly one of them."""
    registry, in_flight = CollectorRegistry(), InFlight()
    register_process(registry, in_flight)

    def state() -> list[str]:
        (family,) = (f for f in registry.collect() if f.name == "trivium_drain_state")
        return [sample.labels["state"] for sample in family.samples if sample.value]

    assert ["none"] == state()
    in_flight.leaving = True
    assert ["notice"] == state()


async def test_the_last_drain_state_is_drain() -> None:
    """In the last state requests are refused."""
    registry, in_flight = CollectorRegistry(), InFlight()
    register_process(registry, in_flight)
    in_flight.leaving = True
    in_flight.draining.set()

    assert 1 == registry.get_sample_value("trivium_drain_state", {"state": "drain"})
    assert 0 == registry.get_sample_value("trivium_drain_state", {"state": "notice"})


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain",
        # The preferences of Prometheus 2 and 3.
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;q=0.2",
        "text/plain;version=1.0.0;escaping=underscores",
    ],
)
async def test_names_are_the_same_for_every_scraper(accept: str) -> None:
    """A colon in a name is never escaped."""
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Text.", registry=registry)
    port = free_port()
    serve_metrics(port, "127.0.0.1", registry, lambda: asyncio.sleep(0))
    async with httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/metrics"
        answer = await client.get(url, headers={"accept": accept})

    assert "vllm:num_requests_running 0.0" in answer.text.splitlines()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_queries_use_existing_metrics_and_labels(
    title: str, query: str, labels: dict[str, set[str]]
) -> None:
    """Each is PromQL, and its metrics exist with the labels that it selects and groups by."""
    expression = promql_parser.parse(query.replace("$__rate_interval", "1m"))
    nodes = list(walked(expression))
    selectors = [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]

    assert selectors
    for selector in selectors:
        assert selector.name in labels
        known = labels[selector.name] | OF_TARGETS
        assert {matcher.name for matcher in selector.matchers.matchers} <= known
    known = OF_TARGETS.union(*(labels[selector.name or ""] for selector in selectors))
    for node in nodes:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= known


def walked(expression: promql_parser.Expr) -> Iterator[promql_parser.Expr]:
    """An expression's nodes."""
    nodes: list[promql_parser.Expr] = []
    promql_parser.walk(expression, nodes.append)
    return iter(nodes)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legends_use_labels_that_the_query_keeps(panel: Any, labels: dict[str, set[str]]) -> None:
    """A legend's {{label}} is one that the query keeps."""
    for target in panel["targets"]:
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= kept_labels(target["expr"], labels)


def kept_labels(query: str, labels: dict[str, set[str]]) -> set[str]:
    """The labels that a query's results may have."""
    summed = re.findall(r"\bsum\b(?: by \(([^)]*)\))?", query)
    if summed:
        return {label.strip() for label in summed[0].split(",")}
    metrics = re.findall(r"[a-z_:]{6,}", query)
    return OF_TARGETS.union(*(labels.get(metric, set()) for metric in metrics))


def test_dashboard_panels_do_not_overlap() -> None:
    """None overlap, ids are unique, and all use the selected data source."""
    panels = DASHBOARD["panels"]
    taken = [
        (column, line)
        for place in (panel["gridPos"] for panel in panels)
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]

    assert len(set(taken)) == len(taken)
    assert all(column < 24 for column, _ in taken)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {"${datasource}"} == {panel["datasource"]["uid"] for panel in PANELS}
    assert "model" in {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Reading it into Grafana's published types and writing it again loses or changes nothing."""
    register_default_plugins()
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))

    assert [] == list(lost(DASHBOARD, back, "dashboard"))


def lost(value: Any, other: Any, place: str) -> Iterator[str]:
    """Where `other` lacks what `value` has; it may have more fields."""
    if isinstance(value, dict) and isinstance(other, dict):
        for name, field in value.items():
            yield from lost(field, other.get(name), f"{place}.{name}")
    elif isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        for number, (one, another) in enumerate(zip(value, other, strict=True)):
            yield from lost(one, another, f"{place}[{number}]")
    elif value != other:
        yield place


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_have_severity_delay_and_annotations(rule: Any, labels: dict[str, set[str]]) -> None:
    """Each has a severity, waits before it fires, and has a summary and a description, which name
    only labels that its expression keeps."""
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert re.fullmatch(r"\d+[mh]", rule["for"])
    assert rule["annotations"].keys() == {"summary", "description"}
    texts = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", texts)) <= kept_labels(rule["expr"], labels)


@pytest.mark.parametrize("command", ["check rules alerts.yaml", "test rules alerts_test.yaml"])
def test_promtool_accepts_the_rules(command: str) -> None:
    """Prometheus can load them, and each fires as its test says, with the right annotations."""
    *words, file = command.split()
    result = prometheus.promtool(*words, FOLDER / file)

    assert 0 == result.returncode, result.stdout + result.stderr


def test_every_rule_is_tested(labels: dict[str, set[str]]) -> None:
    """The tests use series that exist, and each rule fires in one of them."""
    series = [one["series"] for test in RULE_TESTS["tests"] for one in test["input_series"]]
    for text in series:
        selector = promql_parser.parse(text)
        assert isinstance(selector, promql_parser.VectorSelector)
        assert selector.name in labels
        named = {matcher.name for matcher in selector.matchers.matchers}
        assert named <= labels[selector.name] | OF_TARGETS
    fired = {
        alert["alertname"]
        for test in RULE_TESTS["tests"]
        for alert in test.get("alert_rule_test", ())
        if alert["exp_alerts"]
    }

    assert ["alerts.yaml"] == RULE_TESTS["rule_files"]
    assert fired == {rule["alert"] for rule in RULES}
