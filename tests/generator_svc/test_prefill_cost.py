"""What fits into a time is what was measured, place by place."""

from generator_svc.prefill_cost import Pace


def test_it_follows_what_it_sees():
    """After some chunks at another speed, the old one is forgotten."""
    pace = Pace()
    for cost in [1_000] * 5 + [4_000] * 15:
        pace.observe(0, 100, 100 * cost)

    assert 3_900 < pace.cost(0) <= 4_000
    assert 224 <= pace.fitting(1_000_000) <= 256


def test_places_have_speeds_of_their_own():
    """Late tokens cost more; where nothing was seen, the last place before counts."""
    pace = Pace()
    pace.observe(0, 128, 128_000)
    pace.observe(2_048, 128, 256_000)

    assert 1_000 == pace.cost(1_500)
    assert 2_000 == pace.cost(2_100) == pace.cost(9_000)


def test_only_later_places_seen():
    """As after a restart with a cached prefix."""
    pace = Pace()
    pace.observe(4_096, 128, 256_000)

    assert 2_000 == pace.cost(0)


def test_a_few_tokens_tell_nothing():
    """A run's fixed cost would look like slow tokens."""
    pace = Pace()
    before = pace.fitting(10**8)
    pace.observe(0, 3, 10**9)

    assert before == pace.fitting(10**8)


def test_something_always_fits():
    """At least one tile, in whole tiles, so that every prompt ends."""
    pace = Pace()
    pace.observe(0, 512, 10**12)

    assert 32 == pace.fitting(1)


def test_a_clock_that_stands_still_stops_nothing():
    """A device's clock may be too coarse for a small chunk."""
    pace = Pace()
    pace.observe(0, 64, 0)

    assert pace.fitting(1_000) >= 32
