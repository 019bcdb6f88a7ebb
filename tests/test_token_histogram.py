"""The token histogram equals prometheus_client's own for the same observations."""

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from trivium.wire.histogram import TokenHistogram

BUCKETS = (0.001, 0.01, 0.5, 1, 2.5)


def _text(registry: CollectorRegistry) -> list[str]:
    """The scrape, without creation times."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_results_equal_prometheus_own_histogram() -> None:
    """This holds for any values, even the bounds, once or several times, for several models."""
    draw = random.Random(0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    quick = TokenHistogram("a_seconds", "Text.", BUCKETS, ours)
    plain = Histogram("a_seconds", "Text.", ["model_name"], registry=theirs, buckets=BUCKETS)
    for number in range(300):
        seconds = draw.choice([*BUCKETS, 0.0, 7.0, draw.random() / 64, draw.randrange(256) / 64])
        seconds = round(seconds * 1024) / 1024  # so that sums are exact
        count = draw.randrange(1, 5)
        model = f"m{number % 3}"
        quick.labels(model).observe(seconds, count)
        for _ in range(count):
            plain.labels(model).observe(seconds)

    assert _text(theirs) == _text(ours)
