"""What bench.replicas compares with: an oracle's shares and a perfect split."""

import itertools

import pytest

from bench.replicas import Split, Work, draw, lanes


def test_oracle_balances_the_load() -> None:
    """All shares take equally long, and each request is in exactly one."""
    works = list(draw(1000))
    shares = lanes(works, 3)
    seconds = [sum(work.seconds for work in share) for share in shares]

    assert sorted(map(repr, works)) == sorted(map(repr, itertools.chain(*shares)))
    assert max(seconds) < 1.001 * min(seconds)


def test_requests_are_of_mixed_length() -> None:
    """The longest tenth has more than a quarter of all output tokens, and each run draws the
    same."""
    works = list(draw(1000))
    tokens = sorted((work.output_tokens for work in works), reverse=True)

    assert list(draw(1000)) == works
    assert sum(tokens[:100]) > sum(tokens) / 4


@pytest.mark.parametrize(("busy", "ratio"), [((10.0, 10.0, 10.0), 1.0), ((10.0, 5.0, 0.0), 2.0)])
def test_a_perfect_split_keeps_all_busy(busy: tuple[float, ...], ratio: float) -> None:
    """A generator that idles while another one works makes the ratio worse."""
    assert ratio == Split(10.0, busy, 0).ratio


def test_longer_requests_weigh_more() -> None:
    """Whether the prompt or the output is longer."""
    assert Work(10, 10).seconds < Work(20, 10).seconds < Work(20, 20).seconds
