"""How many prompt tokens fit into a time, as measured: the scheduler's bound is one of time.

A token of a prompt costs more the more tokens are before it, since it attends to all of them, so
speeds are kept by where in its prompt a chunk begins. Knows nothing of sequences or slots.
"""

from generator_svc.plan import ATTENTION_TILE

# What is taken before anything is measured: 640 tokens/s, which a laptop reaches.
_FIRST_GUESS = 1_600_000
_WINDOW = 512  # tokens; chunks that begin within the same one share a speed
_LEARNING_RATE = 0.3
_SHORTEST_SAMPLE = 32  # a run's fixed cost would count for too much in less


class Pace:
    """Nanoseconds a prompt token takes, by where it stands: a moving average of what was seen."""

    def __init__(self) -> None:
        self._cost: dict[int, float] = {}

    def observe(self, start: int, tokens: int, nanoseconds: int) -> None:
        """A chunk of `tokens` from position `start` took `nanoseconds`."""
        if tokens < _SHORTEST_SAMPLE:
            return
        window = start // _WINDOW
        seen = max(nanoseconds, 1) / tokens  # a clock may be too coarse
        known = self._cost.get(window, seen)
        self._cost[window] = known + _LEARNING_RATE * (seen - known)

    def cost(self, start: int) -> float:
        """Nanoseconds of a token at `start`: as seen there, or at the nearest place before it."""
        before = [window for window in self._cost if window <= start // _WINDOW]
        if before:
            return self._cost[max(before)]
        return self._cost[min(self._cost)] if self._cost else _FIRST_GUESS

    def fitting(self, nanoseconds: float) -> int:
        """Tokens of a prompt's beginning that fit: whole tiles of the attention, at least one."""
        tokens = int(nanoseconds / self.cost(0))
        return max(tokens - tokens % ATTENTION_TILE, ATTENTION_TILE)
