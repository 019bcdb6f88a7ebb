"""How long a replica that keeps failing is not picked, and when an outage is logged, by the clock.

What callers see of it is in rollout/test_replicas.py and test_outages.py.
"""

from types import SimpleNamespace

import pytest

from trivium.wire.replicas import outage
from trivium.wire.replicas.ejection import Ejection
from trivium.wire.replicas.outage import Outage

# Seconds until a replica is picked again, each time that it fails again when it is.
EJECTIONS = [1, 2, 4, 8, 16, 30, 30]


def fails(ejection: Ejection, times: int, now: float) -> None:
    """That many calls fail at once."""
    for _ in range(times):
        ejection.failed(now)


def test_three_failures_in_a_row_eject() -> None:
    """Two do not, and a success in between starts over."""
    ejection = Ejection()
    fails(ejection, 2, now=5)
    ejection.succeeded()
    fails(ejection, 2, now=5)
    before = ejection.is_ejected(5)
    ejection.failed(5)

    assert not before
    assert ejection.is_ejected(5)
    assert 1 == ejection.count


def test_an_ejection_doubles_until_half_a_minute() -> None:
    """It lasts one second at first, and 30 at most; each further failure ejects again."""
    ejection, now = Ejection(), 100.0
    fails(ejection, 2, now)
    for seconds in EJECTIONS:
        ejection.failed(now)
        assert ejection.is_ejected(now + seconds - 0.01)
        now += seconds
        assert not ejection.is_ejected(now)

    assert len(EJECTIONS) == ejection.count


def test_calls_in_flight_do_not_prolong_an_ejection() -> None:
    """They were sent before it, and say nothing new."""
    ejection = Ejection()
    fails(ejection, 10, now=100)
    fails(ejection, 10, now=100.9)

    assert not ejection.is_ejected(101)
    assert 1 == ejection.count


def test_a_success_ends_an_ejection() -> None:
    """When all replicas are ejected, all are used; the one that answers has its share again, and
    its next ejection takes three failures and is as short as the first."""
    ejection = Ejection()
    fails(ejection, 3, now=100)
    ejection.failed(101)
    ejection.succeeded()
    after = ejection.is_ejected(101)
    fails(ejection, 2, now=102)
    soon = ejection.is_ejected(102)
    ejection.failed(102)

    assert not after
    assert not soon
    assert ejection.is_ejected(102.9)
    assert not ejection.is_ejected(103)


class Clock:
    """The time of `Outage`, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def fail_for(failing: Outage, clock: Clock, seconds: int, reason: str = "refused") -> None:
    """It fails now and every second until then."""
    for _ in range(seconds):
        failing.failed("x:1 cannot be reached", reason)
        clock.now += 1
    failing.failed("x:1 cannot be reached", reason)


def test_an_outage_is_logged_after_half_a_minute(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Shorter ones are expected, as when stages start; longer ones are logged once."""
    failing = Outage()
    fail_for(failing, clock, 29)
    failing.ended()
    clock.now += 100
    fail_for(failing, clock, 29)
    before = caplog.messages.copy()
    fail_for(failing, clock, 100)

    assert [] == before
    assert ["x:1 cannot be reached: refused"] == caplog.messages


def test_an_outage_that_returns_is_logged_again(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """For the same reason, once it has lasted as long again."""
    failing = Outage()
    fail_for(failing, clock, 30)
    failing.ended()
    fail_for(failing, clock, 29)
    before = len(caplog.messages)
    clock.now += 1
    failing.failed("x:1 cannot be reached", "refused")

    assert 1 == before
    assert 2 == len(caplog.messages)


def test_an_outage_is_logged_for_each_reason(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """As it changes; but five times at most, as a reason may have a number that always changes."""
    failing = Outage()
    fail_for(failing, clock, 29)
    for number in [1, 2, 1, 2, 3, 4, 5, 6, 7]:
        clock.now += 1
        failing.failed("x:1 cannot be reached", f"port {number}")

    assert [f"x:1 cannot be reached: port {n}" for n in (1, 2, 3, 4, 5)] == caplog.messages
