"""Samples from a device-resident row's candidates if they alone decide, else from the whole row.

The token is exactly the one that `sampler.sample` draws from the whole row. What is known of the
other tokens, their largest possible logit and the sum of their weights in every block of ids, at
the temperature of the draw, bounds their influence; where they could change it, the whole row is
fetched.

    greedy          the most likely candidate, if no token outside can be as likely
    top_k           the same arithmetic on the same numbers, if all top_k are candidates
    top_p, min_p    likewise, if every possible total truncates at the same candidate
    none of them    if the draw falls into one candidate's interval, wherever the rest lies

Penalties and masks are applied to the candidates first: they only lower logits, so the bounds on
the rest still hold. Whatever may raise logits, log-probabilities, and a draw with top_n_sigma need
the whole row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from generator_svc.sampling import sampler
from generator_svc.sampling.device_row import BLOCK, RELATIVE_ERROR, DeviceRow, GreedyRow
from generator_svc.sampling.draw import MASS_ERROR, position_of
from generator_svc.sampling.random_draw import uniform
from generator_svc.sequence import SampledToken, SamplingParams, Sequence

LogitsRow = sampler.HostRow | DeviceRow | GreedyRow  # float32 [vocabulary]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_ROUNDING = 1e-9  # relative error of exponentials in float64, generously
_SMALLEST = 1e-35  # a block sum that float32 may have flushed to zero


@dataclass(frozen=True, eq=False)
class _WeightBounds:
    """A row after penalties and masks, as weights relative to the largest one.

    `weights` of the candidates `ids` (ascending), whose logits are `logits`, are exact to the last
    bit. No other token weighs more than `max_other`; per block of ids the others' sum lies between
    `low` and `high`, [blocks].
    """

    ids: Ids
    logits: Floats
    weights: Floats
    max_other: float
    low: Floats
    high: Floats

    @property
    def totals(self) -> tuple[float, float]:
        """Lower and upper bound of the sum of all weights, as the sampler adds them up."""
        known = self.weights.sum()
        low, high = known + self.low.sum(), known + self.high.sum()
        return float(low * (1 - MASS_ERROR)), float(high * (1 + MASS_ERROR))


def sample_all(
    drawing: Iterable[tuple[Sequence, LogitsRow]],
) -> tuple[list[tuple[Sequence, SampledToken]], list[tuple[Sequence, BaseException]]]:
    """`sampler.sample_all`, for rows on the host or on the device."""
    return sampler.sample_all(drawing, sample)


def sample(sequence: Sequence, logits: LogitsRow) -> SampledToken:
    """`sampler.sample`, for a row on the host or on the device."""
    if isinstance(logits, GreedyRow):
        if logits.is_certain:
            return SampledToken(logits.token_id)
        logits = logits.fetch()
    if isinstance(logits, DeviceRow):
        token_id = certain_token(sequence, logits)
        if token_id is not None:
            return SampledToken(token_id)
        logits = logits.whole
    return sampler.sample(sequence, logits)


def certain_token(sequence: Sequence, row: DeviceRow) -> int | None:
    """The token that `sampler.sample` draws from the whole row; None if candidates cannot tell."""
    sampling = sequence.request.sampling
    if sequence.request.top_logprobs is not None or _may_raise(sampling) or not _is_sound(row):
        return None
    forbidden = sampler.forbidden_tokens(sequence, row.size)
    is_lowered = forbidden is not None or sampling.has_bias_or_penalties
    if sampling.is_greedy and not is_lowered and row.values[0] > row.values[1]:
        return int(row.ids[0])
    ids, logits = _above_the_rest(row)
    if is_lowered:
        logits = _lowered(sequence, ids, logits, forbidden)
    if not ids.size or logits.max() <= row.values[-1]:
        return None
    if sampling.is_greedy:
        return int(ids[logits.argmax()])
    if sampling.top_n_sigma > 0:  # needs the deviation of all logits
        return None
    if sampling.temperature != row.temperature:  # the masses outside are not those of the draw
        return None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        known = _weigh(row, ids, logits, is_lowered)
        draw = uniform(sampling.seed + sequence.index, sequence.generated)
        if 0 < sampling.top_k < row.size or sampling.top_p < 1 or sampling.min_p > 0:
            return _draw_truncated(known, sampling, row.size, draw)
        return _draw_from_all(known, draw)


def _may_raise(sampling: SamplingParams) -> bool:
    """Whether the parameters may raise a token outside the candidates above them."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty < 1
        or sampling.frequency_penalty < 0
        or sampling.presence_penalty < 0
    )


def _is_sound(row: DeviceRow) -> bool:
    """Whether the largest logit is finite and none is NaN or +inf."""
    is_sound = np.isfinite(row.values[0]) and np.isfinite(row.rest).all()
    return bool(is_sound) and not np.isnan(row.values).any()


def _above_the_rest(row: DeviceRow) -> tuple[Ids, Floats]:
    """Ids (ascending) and logits of the candidates that are above every other token.

    Candidates equal to the last one are left out: a token outside may be equal to them too.
    """
    count = int(np.searchsorted(-row.values, -row.values[-1]))
    order = np.argsort(row.ids[:count])
    return row.ids[order], row.values[order].astype(np.float64)


def _lowered(
    sequence: Sequence, ids: Ids, logits: Floats, forbidden: sampler.Mask | None
) -> Floats:
    """The logits of `ids` with mask and penalties, by the sampler's own arithmetic."""
    sampling = sequence.request.sampling
    row = logits.copy()
    if forbidden is not None:
        row[forbidden[ids]] = -np.inf
    if sampling.repetition_penalty != 1:
        seen = np.isin(ids, sampler.seen_tokens(sequence))
        row[seen] = _rounded(sampler.after_repetition(row[seen], sampling.repetition_penalty))
    if sampling.frequency_penalty or sampling.presence_penalty:
        counts = np.array([sequence.output_counts[token_id] for token_id in ids.tolist()], float)
        less = sampling.frequency_penalty * counts + sampling.presence_penalty
        row = np.where(counts > 0, _rounded(row - less), row)
    return row


def _rounded(logits: Floats) -> Floats:
    """Rounded to float32, as the sampler keeps them."""
    return logits.astype(np.float32).astype(np.float64)


def _weigh(row: DeviceRow, ids: Ids, logits: Floats, is_lowered: bool) -> _WeightBounds:
    """Weights exp((logit - best) / temperature) of the candidates, and bounds on the others'.

    The device summed exp((x - values[0]) / temperature) over the other logits x; `best` differs
    from values[0] only if that was lowered. Penalties and masks can take all from the others.
    """
    best, top, last = float(logits.max()), float(row.values[0]), float(row.values[-1])
    weights = np.exp((logits - best) / row.temperature)
    rest = row.rest.astype(np.float64)
    if last == -np.inf:
        low = high = np.zeros(rest.size)
    else:
        scale = np.exp((top - best) / row.temperature)
        high = (rest * (1 + RELATIVE_ERROR) + _SMALLEST) * scale
        low = np.zeros(rest.size) if is_lowered else rest * (1 - RELATIVE_ERROR) * scale
    return _WeightBounds(
        ids, logits, weights, float(np.exp((last - best) / row.temperature)), low, high
    )


def _draw_truncated(
    known: _WeightBounds, sampling: SamplingParams, size: int, draw: float
) -> int | None:
    """Draws from what top_k, top_p and min_p keep, most likely first; None if uncertain."""
    # Nothing else weighs as much as these, so they come first in the sorted whole row too.
    above = known.max_other * (1 + _ROUNDING) + 1e-300
    sure = np.flatnonzero(known.weights > above)
    order = sure[np.argsort(-known.logits[sure], kind="stable")]
    weights = known.weights[order]
    sums = np.cumsum(weights)
    if 0 < sampling.top_k < size:
        if order.size <= sampling.top_k:  # more than top_k, or it would not be a limit
            return None
        weights, sums = weights[: sampling.top_k], sums[: sampling.top_k]
        totals, above = (float(sums[-1]),) * 2, 0.0
        max_count = sums.size
    else:
        # One more than is known: reaching it means that tokens outside may be kept too.
        totals, max_count = known.totals, sums.size + 1
    if sampling.min_p > above:
        max_count = int(np.count_nonzero(weights >= sampling.min_p))
    kept = {_nucleus_size(sums, sampling.top_p, total, max_count) for total in totals}
    count = kept.pop()
    if kept or count > sums.size:
        return None
    return int(known.ids[order[position_of(sums[:count], draw)]])


def _nucleus_size(sums: Floats, top_p: float, total: float, max_count: int) -> int:
    """How many of the most likely tokens reach `top_p` of `total`; at most `max_count`."""
    if top_p >= 1:
        return max_count
    return min(int(np.searchsorted(sums, top_p * total)) + 1, max_count)


def _draw_from_all(known: _WeightBounds, draw: float) -> int | None:
    """The candidate into whose interval the draw falls, wherever the rest lies; None if uncertain.

    Intervals are in the order of ids, as in the sampler: the tokens before a candidate move its
    interval by some amount between `before` and `up_to`.
    """
    low_total, high_total = known.totals
    slack = MASS_ERROR * high_total
    ends = np.cumsum(known.weights)
    starts = ends - known.weights
    block = known.ids // BLOCK
    # The rest of its own block may lie entirely before a candidate, or entirely after it.
    before = np.concatenate(([0.0], np.cumsum(known.low)))[block]
    up_to = np.cumsum(known.high)[block]
    is_after_start = starts + up_to + slack <= draw * low_total
    inside = is_after_start & (draw * high_total < ends + before - slack)
    hits = np.flatnonzero(inside)
    return int(known.ids[hits[0]]) if hits.size else None
