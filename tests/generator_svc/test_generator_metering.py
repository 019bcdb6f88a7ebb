"""Device time: shares add up to the last nanosecond, and a lost one is noticed."""

import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_svc.admission import Admission
from generator_svc.metering import CACHE_MOVES, PADDING, Meter, share
from generator_svc.sequence import EngineRequest, FinishReason, SequenceGroup

weights = st.lists(st.integers(0, 4096), min_size=1, max_size=64).filter(any)
times = st.integers(0, 10**12)


@given(nanoseconds=times, weights=weights)
def test_shares_add_up_and_are_the_nearest_integers(nanoseconds, weights):
    """Each share is the exact one, rounded up or down to whole nanoseconds."""
    shares = share(nanoseconds, weights)
    exact = [Fraction(nanoseconds * weight, sum(weights)) for weight in weights]

    assert nanoseconds == sum(shares)
    assert all(abs(got - wanted) < 1 for got, wanted in zip(shares, exact, strict=True))
    assert all(got == wanted for got, wanted in zip(shares, exact, strict=True) if wanted == 0)


@given(nanoseconds=times, weights=weights)
def test_the_spare_nanoseconds_go_to_the_largest_remainders(nanoseconds, weights):
    """A share that is rounded up has at least as large a remainder as any rounded down."""
    shares = share(nanoseconds, weights)
    cuts = [nanoseconds * weight % sum(weights) for weight in weights]
    is_up = [got > nanoseconds * w // sum(weights) for got, w in zip(shares, weights, strict=True)]
    up = [cut for cut, went_up in zip(cuts, is_up, strict=True) if went_up]
    down = [cut for cut, went_up in zip(cuts, is_up, strict=True) if not went_up]

    assert min(up, default=max(cuts)) >= max(down, default=0)


def test_shares_of_known_examples():
    """Ties always go to the first."""
    assert [4, 3, 3] == share(10, [1, 1, 1])
    assert [1, 1, 0] == share(2, [5, 5, 5])
    assert [2, 7, 0] == share(9, [1, 4, 0])  # 1.8 and 7.2
    assert [0, 0] == share(0, [1, 2])


def _sequences(count):
    request = EngineRequest((1, 2), 3, n=count)
    return SequenceGroup(request, Admission(1, 9).enter(2)).sequences


charges = st.lists(
    st.tuples(times, st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 99)), min_size=1)),
    max_size=20,
)


@given(charges=charges, overhead=st.lists(times), ended=st.sets(st.integers(0, 4)))
def test_busy_is_what_sequences_and_overhead_were_charged(charges, overhead, ended):
    """Whatever is charged to which sequences, and whichever have ended, it all adds up."""
    meter, sequences = Meter(), _sequences(5)
    for nanoseconds, rows in charges:
        owners = [(sequences[who] if who >= 0 else None, tokens) for who, tokens in rows]
        meter.charge(nanoseconds, owners)
    for nanoseconds in overhead:
        meter.charge_overhead(nanoseconds, CACHE_MOVES)
    for index in ended:
        sequences[index].finish_reason = list(FinishReason)[index]
        meter.settle(sequences[index])
    running = [sequence for sequence in sequences if sequence.index not in ended]

    meter.check_integrity(running)
    spent = sum(sequence.device_nanoseconds for sequence in sequences)
    assert sum(nanoseconds for nanoseconds, _ in charges) + sum(overhead) == meter.busy
    assert meter.busy == spent + meter.overhead.total()
    assert sum(overhead) == meter.overhead[CACHE_MOVES]
    assert sum(sequences[i].device_nanoseconds for i in ended) == meter.settled.total()


@given(nanoseconds=times, rows=st.lists(st.integers(-1, 4), min_size=1))
def test_decode_rows_are_charged_as_one_token_each(nanoseconds, rows):
    """The fast way gives the same accounts as the general one, to the nanosecond."""
    accounts = []
    for is_fast in (False, True):
        meter, sequences = Meter(), _sequences(5)
        owners = [sequences[who] if who >= 0 else None for who in rows]
        if is_fast:
            meter.charge_rows(nanoseconds, owners)
        else:
            meter.charge(nanoseconds, [(owner, 1) for owner in owners])
        meter.check_integrity(sequences)
        spent = [sequence.device_nanoseconds for sequence in sequences]
        accounts.append((meter.busy, meter.overhead, spent))

    assert accounts[0] == accounts[1]


def test_idle_rows_are_padding():
    """Rows that belong to no sequence are charged to the overhead for padding."""
    meter, [sequence] = Meter(), _sequences(1)
    meter.charge_rows(9, [None, sequence, None])

    assert 3 == sequence.device_nanoseconds
    assert {PADDING: 6} == meter.overhead


def test_unaccounted_nanosecond_is_detected():
    """The check fails if a sequence was never settled, or if time was charged to no one."""
    meter, [sequence] = Meter(), _sequences(1)
    meter.charge(7, [(sequence, 1)])
    meter.check_integrity([sequence])
    with pytest.raises(AssertionError):
        meter.check_integrity([])
    meter.busy += 1
    with pytest.raises(AssertionError):
        meter.check_integrity([sequence])


def test_a_snapshot_adds_up_while_time_is_charged():
    """Even if another thread takes it while the engine's thread is charging."""
    meter, ended = Meter(), threading.Event()

    def charge():
        while not ended.is_set():
            meter.charge(800, [(None, 1)] * 8)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    engine = threading.Thread(target=charge)
    engine.start()
    try:
        books = [meter.snapshot() for _ in range(2_000)]
    finally:
        ended.set()
        engine.join()
        sys.setswitchinterval(interval)

    assert [busy for busy, _, _ in books] == [overhead.total() for _, overhead, _ in books]
    assert books[-1][0] > 0
