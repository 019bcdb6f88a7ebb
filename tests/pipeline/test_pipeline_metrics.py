"""The metrics of the three services before any request."""

from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.pipeline.services import Services
from trivium.cli.pipeline import LOOPBACK

# Labels whose values depend on requests: what they ask for, and their key.
OPEN = {"status", "route", "key"}


def ports(services: Services) -> list[int]:
    """The port of each stage's metrics."""
    pipeline = services.pipeline
    return [pipeline.port, pipeline.tokenizer_metrics_port, pipeline.generator_metrics_port]


def counters(ports: list[int]) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """All counter and histogram series at these ports, by name and labels, without open labels."""
    found = set()
    for port in ports:
        text = httpx.get(f"http://{LOOPBACK}:{port}/metrics").text
        for family in text_string_to_metric_families(text):
            if family.type in ("counter", "histogram"):
                for sample in family.samples:
                    if not OPEN & sample.labels.keys():
                        found.add((sample.name, frozenset(sample.labels.items())))
    return found


def test_counters_start_at_zero(tiny_model: Path, tmp_path: Path) -> None:
    """A rate then includes the first request, refusal and failure: Prometheus cannot compute the
    rate of a series that starts with its first event."""
    with Services(tiny_model, tmp_path) as services:
        facade, tokenizer, generator = ports(services)
        before = counters([facade, tokenizer, generator])
        url = f"{services.url}/v1/chat/completions"
        body = {"model": services.model, "messages": [{"role": "user", "content": "Once"}]}
        endless = {**body, "max_tokens": 400, "ignore_eos": True, "stream": True}
        httpx.post(url, json=body | {"max_tokens": 3}, timeout=60)
        httpx.post(url, json=body | {"temperature": 9})
        httpx.post(url, json=body | {"logit_bias": {"999999": 1}})
        with httpx.stream("POST", url, json=endless, timeout=60) as stream:
            next(stream.iter_lines())
        services.wait_until_idle()
        of_generator = counters([generator])
        with httpx.stream("POST", url, json=endless, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            services.kill("generator_svc")
            assert '"backend_unavailable"' in "".join(lines)

        assert set() == of_generator - before
        assert set() == counters([facade, tokenizer]) - before
