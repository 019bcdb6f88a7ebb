"""A moving average of a prompt token's cost, by position, so that prefill can be bounded in time.

The more tokens precede a token, the more it costs, since it attends to all of them. Averages are
therefore kept by the position in the prompt at which a chunk begins.
"""

from generator_svc.plan import ATTENTION_TILE

_INITIAL_COST = 1_600_000  # ns per token until the first measurement: about 640 tokens/s, a laptop
_WINDOW_TOKENS = 512  # chunks that begin within the same window share an average
_LEARNING_RATE = 0.3
_MIN_SAMPLE_TOKENS = 32  # in shorter chunks the fixed cost of a run would dominate


class PrefillCostModel:
    """Nanoseconds per prompt token, by position: exponential moving averages of measured chunks."""

    def __init__(self) -> None:
        self._cost: dict[int, float] = {}

    def observe(self, start: int, tokens: int, nanoseconds: int) -> None:
        """Records that a chunk of `tokens` tokens from position `start` took `nanoseconds`."""
        if tokens < _MIN_SAMPLE_TOKENS:
            return
        window = start // _WINDOW_TOKENS
        sample = max(nanoseconds, 1) / tokens  # a coarse clock may report 0
        average = self._cost.get(window, sample)
        self._cost[window] = average + _LEARNING_RATE * (sample - average)

    def cost(self, start: int) -> float:
        """Nanoseconds per token at `start`, from its window or the nearest measured one before it.

        If none was measured before it, the first measured one. For any thread.
        """
        windows = sorted(self._cost.copy())
        if not windows:
            return _INITIAL_COST
        before = [window for window in windows if window <= start // _WINDOW_TOKENS]
        return self._cost[before[-1] if before else windows[0]]

    def tokens_within(self, nanoseconds: float) -> int:
        """How many tokens at a prompt's start fit: whole attention tiles, at least one."""
        tokens = int(nanoseconds / self.cost(0))
        return max(tokens - tokens % ATTENTION_TILE, ATTENTION_TILE)
