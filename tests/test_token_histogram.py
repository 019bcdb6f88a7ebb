"""The histogram of tokens says what Prometheus' own says of the same observations."""

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from trivium.wire.histogram import TokenHistogram

BUCKETS = (0.001, 0.01, 0.5, 1, 2.5)


def _text(registry: CollectorRegistry) -> list[str]:
    """What a scrape sees, but for the time at which the metric was made."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_it_is_prometheus_own_but_for_its_speed() -> None:
    """Any values, those of the bounds too, once or several times, for several models."""
    draw = random.Random(0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    quick = TokenHistogram("a_seconds", "Text.", BUCKETS, ours)
    plain = Histogram("a_seconds", "Text.", ["model_name"], registry=theirs, buckets=BUCKETS)
    for number in range(300):
        seconds = draw.choice([*BUCKETS, 0.0, 7.0, draw.random() / 64, draw.randrange(256) / 64])
        seconds = round(seconds * 1024) / 1024  # so that sums have no rounding
        count = draw.randrange(1, 5)
        model = f"m{number % 3}"
        quick.labels(model).observe(seconds, count)
        for _ in range(count):
            plain.labels(model).observe(seconds)

    assert _text(theirs) == _text(ours)
