"""Device time in integer nanoseconds: who used it, to the last one.

    busy = what all sequences were charged + overhead by reason        (exactly, always)

A run's time is shared among the sequences in it by the tokens each had there, largest
remainder first (Hamilton's method), so that the shares are integers that add up to the time.
"""

import threading
from collections import Counter
from collections.abc import Sequence as ListOf

from generator_svc.sequence import FinishReason, Sequence

PADDING = "padding"
CACHE_MOVES = "cache_moves"
WARM_UP = "warm_up"
ANSWERS = "answers"


def share(nanoseconds: int, weights: ListOf[int]) -> list[int]:
    """`nanoseconds` split in proportion to `weights` (not all zero) into integers."""
    total = sum(weights)
    assert total > 0
    shares = [nanoseconds * weight // total for weight in weights]
    remainders = [(-(nanoseconds * weight % total), i) for i, weight in enumerate(weights)]
    for _, i in sorted(remainders)[: nanoseconds - sum(shares)]:
        shares[i] += 1
    return shares


class Meter:
    """The engine's account. `settled` has the time of ended sequences by how they ended.

    The engine's thread writes; another one takes a `snapshot`, which adds up at any moment.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.busy = 0
        self.overhead: Counter[str] = Counter()
        self.charged = 0
        self.settled: Counter[FinishReason] = Counter()

    def charge(self, nanoseconds: int, tokens: ListOf[tuple[Sequence | None, int]]) -> None:
        """Charges a run to those in it. None stands for rows that were nobody's: padding."""
        shares = share(nanoseconds, [count for _, count in tokens])
        with self._lock:
            self.busy += nanoseconds
            for (sequence, _), nanos in zip(tokens, shares, strict=True):
                if sequence is None:
                    self.overhead[PADDING] += nanos
                else:
                    sequence.device_nanoseconds += nanos
                    self.charged += nanos

    def charge_overhead(self, nanoseconds: int, reason: str) -> None:
        """Charges time that belongs to no sequence."""
        with self._lock:
            self.busy += nanoseconds
            self.overhead[reason] += nanoseconds

    def settle(self, sequence: Sequence) -> None:
        """Books an ended sequence's time under the way it ended; once for each sequence."""
        assert sequence.finish_reason is not None
        with self._lock:
            self.settled[sequence.finish_reason] += sequence.device_nanoseconds

    def snapshot(self) -> tuple[int, Counter[str], Counter[FinishReason]]:
        """Copies of `busy`, `overhead` and `settled`, all of one moment. For any thread."""
        with self._lock:
            return self.busy, self.overhead.copy(), self.settled.copy()

    def check_integrity(self, running: ListOf[Sequence]) -> None:
        """Raises AssertionError when a nanosecond is missing. `running`: who is not settled."""
        assert self.busy == self.charged + self.overhead.total()
        unsettled = sum(sequence.device_nanoseconds for sequence in running)
        assert self.charged == self.settled.total() + unsettled
