"""A moving average of what a prompt token costs, by position, so that prefill is bounded in time.

A token costs more the more tokens precede it, since it attends to all of them, so the averages are
kept by where in its prompt a chunk begins.
"""

from generator_svc.plan import ATTENTION_TILE

_INITIAL_COST = 1_600_000  # ns per token, before the first measurement: a laptop's 640 tokens/s
_WINDOW_TOKENS = 512  # chunks that begin within the same window share an average
_LEARNING_RATE = 0.3
_MIN_SAMPLE_TOKENS = 32  # in shorter chunks a run's fixed cost would dominate


class PrefillCostModel:
    """Nanoseconds per prompt token, by position: exponential moving averages of measured chunks."""

    def __init__(self) -> None:
        self._cost: dict[int, float] = {}

    def observe(self, start: int, tokens: int, nanoseconds: int) -> None:
        """A chunk of `tokens` from position `start` took `nanoseconds`."""
        if tokens < _MIN_SAMPLE_TOKENS:
            return
        window = start // _WINDOW_TOKENS
        sample = max(nanoseconds, 1) / tokens  # a coarse clock may report 0
        average = self._cost.get(window, sample)
        self._cost[window] = average + _LEARNING_RATE * (sample - average)

    def cost(self, start: int) -> float:
        """Nanoseconds per token at `start`, from its window or the nearest measured one before.

        For any thread.
        """
        windows = sorted(self._cost.copy())
        if not windows:
            return _INITIAL_COST
        before = [window for window in windows if window <= start // _WINDOW_TOKENS]
        return self._cost[before[-1] if before else windows[0]]

    def tokens_within(self, nanoseconds: float) -> int:
        """Tokens from a prompt's start that fit: whole attention tiles, at least one."""
        tokens = int(nanoseconds / self.cost(0))
        return max(tokens - tokens % ATTENTION_TILE, ATTENTION_TILE)
