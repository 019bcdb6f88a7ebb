"""Draws a token from adjusted logits by inverse transform sampling; sorts only what may be drawn.

With top_k, top_p or min_p, tokens divide the unit interval in descending order of probability, and
only as many are examined as these may keep; otherwise in the order of their ids. Weights of which
only sums are used are float32, and these sums have a relative error of MASS_ERROR; everything else
is float64.

Everything is computed from one row, in blocks of constant sizes: the same row gives the same token
whatever else is in the batch.
"""

import bisect
import math

import numpy as np
import numpy.typing as npt

from generator_svc.sequence import SamplingParams

Row = npt.NDArray[np.float32]  # logits [vocabulary]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

MASS_ERROR = 1e-5  # a generous bound on the relative error of sums of float32 weights

_BLOCK = 256  # tokens with consecutive ids, whose weights are summed in float32
_GROUPED = 32  # tokens per group, of which only the largest logit is compared at first
_MIN_CANDIDATES = 128  # first number of tokens that top_p and min_p examine
_LONG_ROW = 1 << 14  # rows of this size, if sorted as a whole, are summed in blocks too
MIN_TEMPERATURE = 1e-30  # lower ones make no difference, and have no reciprocal in float32
# Totals of weights whose exponents need no shift: the largest exponents that matter are between -30
# and 70, and float32 rounds these by less than MASS_ERROR / 2.
_SOUND_TOTALS = (1e-8, 1e30)


class BadLogits(ArithmeticError):
    """The model's logits are NaN, or no token can be drawn."""


def draw(row: Row, sampling: SamplingParams, uniform: float) -> int:
    """The token that `uniform`, a number in [0, 1), selects among those that the parameters keep.

    The temperature is above zero. Raises BadLogits. Results are correct in spite of overflow and
    underflow; callers have to silence numpy's warnings about them.
    """
    if sampling.top_n_sigma > 0:
        row = _near_the_best(row, sampling.top_n_sigma)
    if sampling.top_p >= 1 and sampling.min_p == 0 and not 0 < sampling.top_k < row.size:
        return _draw_from_all(row, sampling.temperature, uniform)
    return _draw_from_likely(row, sampling, uniform)


def checked(best: float) -> float:
    """Returns `best`, the largest logit of a row; raises BadLogits if it is not finite."""
    if math.isfinite(best):
        return best
    if best == -math.inf:
        raise BadLogits("no token is left to sample")
    raise BadLogits("the model's logits are not finite")


def position_of(cumulative: Floats, uniform: float) -> int:
    """The first index whose cumulative weight exceeds `uniform` of the total."""
    index = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    if index < cumulative.size:
        return index
    # Rounding reached the total itself: take the last index with any weight.
    return int(cumulative.searchsorted(cumulative[-1]))


def most_likely(row: Row, count: int) -> Ids:
    """Ids of the `count` largest logits in descending order, the lower id first on ties."""
    if count == 0:
        return np.empty(0, np.intp)
    ids = _candidates(row, _group_maxima(row), count)
    if ids is None:
        ids = np.arange(row.size)
    return ids[np.argsort(-row[ids], kind="stable")][:count]


def _near_the_best(row: Row, deviations: float) -> Row:
    """Masks tokens more than `deviations` standard deviations below the best (top_n_sigma).

    As in llama.cpp, masked tokens do not count towards the standard deviation, and the filter comes
    after the penalties and before top_k. Temperature scales both sides, so it may come before or
    after.
    """
    best = checked(float(row.max()))
    spread = row[np.isfinite(row)].std(dtype=np.float64)
    return np.where(row < best - deviations * spread, np.float32(-np.inf), row)


def _draw_from_all(row: Row, temperature: float, uniform: float) -> int:
    weights, masses, _ = _weigh(row, temperature)
    return _position_in_blocks(weights, masses.cumsum(), uniform)


def _position_in_blocks(weights: Row, cumulative: Floats, uniform: float) -> int:
    """`position_of` for `weights`, given the cumulative sums of their blocks."""
    block = position_of(cumulative, uniform)
    start = block * _BLOCK
    inside = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    before = cumulative[block - 1] if block else 0.0
    within = (uniform * cumulative[-1] - before) / inside[-1]
    return start + position_of(inside, min(max(within, 0.0), math.nextafter(1.0, 0.0)))


def _draw_from_likely(row: Row, sampling: SamplingParams, uniform: float) -> int:
    """Examines more and more of the most likely tokens, until no others can be kept."""
    has_top_k = 0 < sampling.top_k < row.size
    count = sampling.top_k if has_top_k else _MIN_CANDIDATES
    maxima = _group_maxima(row)
    best = checked(float(maxima.max()))
    mass = 0.0  # unknown
    while True:
        ids = _candidates(row, maxima, count)
        if ids is None and not has_top_k and row.size >= _LONG_ROW:
            return _draw_from_sorted(row, best, sampling, uniform)
        logits = row if ids is None else row[ids]
        ascending = np.sort(logits)
        if has_top_k:
            ascending = ascending[-sampling.top_k :]
        sums, last, limit = _sums(ascending[::-1], best, sampling)
        least = float(sums[-1])
        if has_top_k or ids is None:
            kept = _kept(sums, least, sampling.top_p, limit)
            break
        # No other token weighs more than the last of these.
        most = least + (row.size - sums.size) * last
        kept = _kept(sums, mass or most, sampling.top_p, limit)
        if mass == 0 and kept != _kept(sums, least, sampling.top_p, limit):
            _, masses, shift = _weigh(row, sampling.temperature)
            mass = float(masses.sum()) * math.exp((shift - best) / sampling.temperature)
            kept = _kept(sums, mass, sampling.top_p, limit)
        if kept < sums.size:
            break
        is_flat = sampling.top_p * mass - least > row.size / 4 * last or count >= maxima.size
        count = row.size if is_flat else min(8 * count, maxima.size)
    return _token_at(position_of(sums[:kept], uniform), ascending, logits, ids)


def _draw_from_sorted(row: Row, best: float, sampling: SamplingParams, uniform: float) -> int:
    """For long flat rows, of which top_p or min_p keep thousands of tokens.

    Avoids a float64 cumulative sum over all tokens, which takes longer than the sort.
    """
    descending = np.negative(row)
    descending.sort()
    np.negative(descending, out=descending)
    weights, masses, _ = _weigh(descending, sampling.temperature)
    cumulative = masses.cumsum()
    kept = row.size
    if sampling.top_p < 1:
        kept = _position_in_blocks(weights, cumulative, sampling.top_p) + 1
    if sampling.min_p > 0:

        def lightness(logit: np.float32) -> float:
            return -math.exp((float(logit) - best) / sampling.temperature)

        kept = min(kept, bisect.bisect_right(descending, -sampling.min_p, key=lightness))
    blocks = kept // _BLOCK
    mass = weights[blocks * _BLOCK : kept].sum(dtype=np.float64)
    mass += cumulative[blocks - 1] if blocks else 0.0
    place = _position_in_blocks(weights, cumulative, uniform * mass / cumulative[-1])
    place = min(place, kept - 1)
    logit = descending[place]
    above = np.count_nonzero(row > logit)
    return int((row == logit).nonzero()[0][place - above])


def _sums(ordered: Row, best: float, sampling: SamplingParams) -> tuple[Floats, float, int]:
    """Cumulative weights of descending logits, the last weight, and how many min_p keeps."""
    weights = ordered.astype(np.float64)
    weights -= best  # in place: touching new memory takes longer than the exponentials
    weights /= sampling.temperature
    np.exp(weights, out=weights)
    last, limit = float(weights[-1]), weights.size
    if sampling.min_p > 0:  # the largest weight is 1
        limit = int(np.count_nonzero(weights >= sampling.min_p))
    return weights.cumsum(out=weights), last, limit


def _kept(sums: Floats, mass: float, top_p: float, limit: int) -> int:
    """How many of the most likely tokens are needed to reach `top_p` of the total weight `mass`."""
    if top_p >= 1:
        return limit
    return min(limit, int(sums.searchsorted(top_p * mass)) + 1, sums.size)


def _token_at(place: int, ascending: Row, logits: Row, ids: Ids | None) -> int:
    """The token at `place` in descending order of `logits`, the lower id first on ties.

    `ids` are the tokens of `logits`; None stands for all tokens.
    """
    logit = ascending[-1 - place]
    above = ascending.size - int(ascending.searchsorted(logit, side="right"))
    position = (logits == logit).nonzero()[0][place - above]
    return int(position if ids is None else ids[position])


def _group_maxima(row: Row) -> Row:
    """The largest logit of each group of tokens, NaN if any is; the remainder is the last group."""
    groups = row.size // _GROUPED
    # The matrix's rows are contiguous, so that whole vectors are compared at once.
    maxima = np.maximum.reduce(row[: groups * _GROUPED].reshape(_GROUPED, groups), axis=0)
    rest = row[groups * _GROUPED :]
    return np.append(maxima, rest.max()) if rest.size else maxima


def _candidates(row: Row, maxima: Row, count: int) -> Ids | None:
    """Ids of all tokens at or above a threshold, ascending; None stands for all tokens.

    The threshold is the `count`-th largest of `maxima`, so there are at least `count` of them.
    """
    if count > maxima.size:
        return None
    threshold = np.partition(maxima, maxima.size - count)[maxima.size - count]
    groups = row.size // _GROUPED
    chosen: Ids = (maxima[:groups] >= threshold).nonzero()[0]
    ids: Ids
    if 8 * chosen.size > groups:
        (ids,) = (row >= threshold).nonzero()
        return ids
    grid = row[: groups * _GROUPED].reshape(_GROUPED, groups)
    # Far faster in one dimension than in two.
    places = (grid.take(chosen, axis=1) >= threshold).ravel().nonzero()[0]
    lines = places // chosen.size
    ids = lines * groups + chosen[places - lines * chosen.size]
    if groups * _GROUPED < row.size:
        rest = (row[groups * _GROUPED :] >= threshold).nonzero()[0]
        ids = np.concatenate((ids, rest + groups * _GROUPED))
    return ids


def _weigh(row: Row, temperature: float) -> tuple[Row, Floats, float]:
    """exp((logit - shift) / temperature) of each token, the sums of its blocks, and the shift.

    The shift is 0 if no overflow or underflow matters, else the largest logit. Raises BadLogits.
    """
    scale = np.float32(1 / max(temperature, MIN_TEMPERATURE))
    low, high = _SOUND_TOTALS
    if temperature == 1:
        weights = np.exp(row)
    else:
        weights = row * scale
        np.exp(weights, out=weights)
    masses = _block_masses(weights)
    if low <= masses.sum() <= high:
        return weights, masses, 0.0
    best = checked(float(row.max()))
    weights = (row - np.float32(best)) * scale
    np.exp(weights, out=weights)
    return weights, _block_masses(weights), best


def _block_masses(weights: Row) -> Floats:
    """The sums of the blocks of weights."""
    whole = weights.size // _BLOCK
    masses = np.zeros(-(-weights.size // _BLOCK))
    # Takes a third of the time of sum(axis=1).
    masses[:whole] = np.einsum("ij->i", weights[: whole * _BLOCK].reshape(whole, _BLOCK))
    if whole < masses.size:
        masses[-1] = weights[whole * _BLOCK :].sum()
    return masses
