"""Outlier ejection: a replica whose calls keep failing is not picked for a while, whatever health
it reports. One that fails fast has few calls outstanding, so it would be picked most often.
"""

MAX_FAILURES = 3  # in a row: a request that always fails is not the replica's fault
MIN_SECONDS, MAX_SECONDS = 1.0, 30.0  # of an ejection; doubles each time until a success


class Ejection:
    """Whether one replica is ejected; `count` is how often it has been. Times are in seconds."""

    def __init__(self) -> None:
        self.count = 0
        self._failures = 0
        self._seconds = MIN_SECONDS
        self._until = 0.0

    def is_ejected(self, now: float) -> bool:
        """Whether the replica must not be picked now."""
        return now < self._until

    def succeeded(self) -> None:
        """A call was answered, which ends the ejection: when all replicas are ejected, all are
        used."""
        self._failures = 0
        self._seconds = MIN_SECONDS
        self._until = 0.0

    def failed(self, now: float) -> None:
        """A call failed before its first answer. After an ejection, one failure ejects it again."""
        self._failures += 1
        if self._failures < MAX_FAILURES or self.is_ejected(now):  # was in flight when ejected
            return
        self.count += 1
        self._until = now + self._seconds
        self._seconds = min(2 * self._seconds, MAX_SECONDS)
