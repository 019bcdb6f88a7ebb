"""How many tokens fit into a time follows from measurements, by position in the prompt."""

from generator_svc.prefill_cost import PrefillCostModel


def test_estimate_follows_the_latest_measurements():
    """After some chunks at another speed, the old one is forgotten."""
    model = PrefillCostModel()
    for cost in [1_000] * 5 + [4_000] * 15:
        model.observe(0, 100, 100 * cost)

    assert 3_900 < model.cost(0) <= 4_000
    assert 224 <= model.tokens_within(1_000_000) <= 256


def test_speed_depends_on_the_position():
    """Late tokens cost more; if nothing was measured at a position, the last one before counts."""
    model = PrefillCostModel()
    model.observe(0, 128, 128_000)
    model.observe(2_048, 128, 256_000)

    assert 1_000 == model.cost(1_500)
    assert 2_000 == model.cost(2_100) == model.cost(9_000)


def test_only_later_positions_measured():
    """As after a restart with a cached prefix."""
    model = PrefillCostModel()
    model.observe(4_096, 128, 256_000)

    assert 2_000 == model.cost(0)


def test_short_chunks_are_not_measured():
    """A run's fixed cost would look like slow tokens."""
    model = PrefillCostModel()
    before = model.tokens_within(10**8)
    model.observe(0, 3, 10**9)

    assert before == model.tokens_within(10**8)


def test_at_least_one_tile_fits():
    """At least one tile, in whole tiles, so that every prompt makes progress."""
    model = PrefillCostModel()
    model.observe(0, 512, 10**12)

    assert 32 == model.tokens_within(1)


def test_coarse_clock_is_harmless():
    """A device's clock may be too coarse for a small chunk."""
    model = PrefillCostModel()
    model.observe(0, 64, 0)

    assert model.tokens_within(1_000) >= 32
