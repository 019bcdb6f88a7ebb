"""Counter-based uniform random numbers, a function of seed and position alone.

The number at position t is the t-th output of SplitMix64 (Steele, Lea, Flood: "Fast splittable
pseudorandom number generators", OOPSLA 2014), whose state is a plain counter, so any position can
be computed without those before it. The seed is mixed once, since otherwise neighbouring seeds
would give overlapping streams.
"""

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for any integer seed and position."""
    state = _mix(seed & _MASK) + (position + 1) * _GOLDEN_GAMMA
    return (_mix(state & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
