"""Metering of device time in integer nanoseconds, exact to the nanosecond.

    busy = charged to sequences + overhead by reason        (exactly, at any time)

A run's time is split among the sequences in it in proportion to their tokens, by the largest
remainder method (Hamilton), so that the shares are integers and add up to the run's time.
"""

import threading
from collections import Counter
from collections.abc import Sequence as ListOf

from generator_svc.sequence import FinishReason, Sequence

PADDING = "padding"
CACHE_MOVES = "cache_moves"
WARM_UP = "warm_up"
REPREFILL = "reprefill"
OVERHEADS = (PADDING, CACHE_MOVES, WARM_UP, REPREFILL)


def share(nanoseconds: int, weights: ListOf[int]) -> list[int]:
    """Splits `nanoseconds` into integers in proportion to `weights`, which are not all zero."""
    total = sum(weights)
    assert total > 0
    shares = [nanoseconds * weight // total for weight in weights]
    remainders = [(-(nanoseconds * weight % total), i) for i, weight in enumerate(weights)]
    for _, i in sorted(remainders)[: nanoseconds - sum(shares)]:
        shares[i] += 1
    return shares


class Meter:
    """Counts device time. `settled` is the device time of ended sequences, by finish reason.

    `steps` counts the engine's steps by the number of tokens computed, prefill and decode.

    Written by the engine's thread; any thread may take a `snapshot`, which is always consistent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.busy = 0
        self.overhead: Counter[str] = Counter()
        self.charged = 0
        self.settled: Counter[FinishReason] = Counter()
        self.steps: Counter[int] = Counter()

    def charge(self, nanoseconds: int, tokens: ListOf[tuple[Sequence | None, int]]) -> None:
        """Charges a run to its sequences by their tokens; None stands for padding."""
        shares = share(nanoseconds, [count for _, count in tokens])
        with self._lock:
            self.busy += nanoseconds
            for (sequence, _), nanos in zip(tokens, shares, strict=True):
                if sequence is None:
                    self.overhead[PADDING] += nanos
                else:
                    sequence.device_nanoseconds += nanos
                    self.charged += nanos

    def charge_rows(self, nanoseconds: int, owners: ListOf[Sequence | None]) -> None:
        """Charges a run with one token for each of `owners`: a faster special case of `charge`."""
        least, rest = divmod(nanoseconds, len(owners))
        padding = 0
        with self._lock:
            for row, owner in enumerate(owners):
                nanos = least + 1 if row < rest else least  # ties go to the first, as in `share`
                if owner is None:
                    padding += nanos
                else:
                    owner.device_nanoseconds += nanos
            self.busy += nanoseconds
            self.charged += nanoseconds - padding
            if padding:
                self.overhead[PADDING] += padding

    def charge_overhead(self, nanoseconds: int, reason: str) -> None:
        """Charges device time that belongs to no sequence."""
        with self._lock:
            self.busy += nanoseconds
            self.overhead[reason] += nanoseconds

    def settle(self, sequence: Sequence) -> None:
        """Adds an ended sequence's time to the total of its finish reason; once per sequence."""
        assert sequence.finish_reason is not None
        with self._lock:
            self.settled[sequence.finish_reason] += sequence.device_nanoseconds

    def snapshot(self) -> tuple[int, Counter[str], Counter[FinishReason]]:
        """Consistent copies of `busy`, `overhead` and `settled`. For any thread."""
        with self._lock:
            return self.busy, self.overhead.copy(), self.settled.copy()

    def check_integrity(self, running: ListOf[Sequence]) -> None:
        """Raises AssertionError if a nanosecond is missing. `running`: the unsettled sequences."""
        assert self.busy == self.charged + self.overhead.total()
        unsettled = sum(sequence.device_nanoseconds for sequence in running)
        assert self.charged == self.settled.total() + unsettled
