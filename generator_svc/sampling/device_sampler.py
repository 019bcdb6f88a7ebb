"""Draws from a row's candidates where they alone decide, and from the whole row where not.

The token is the very one that `sampler.sample` draws from the whole row: what is known of the rest
of the row, its largest possible logit and the sum of its weights in every block of ids, bounds all
that the rest could change, and a draw that it could change is not made here.

    greedy          the most likely candidate, if no token outside can be as likely
    top_k           the same arithmetic on the same numbers, if all top_k are candidates
    top_p, min_p    the same, if all that the total may be cuts at the same candidate
    none of them    if the draw falls into one candidate's interval, wherever the rest lies

Penalties and masks are applied before, since they only lower logits: what they do to the rest
keeps its bounds. What raises logits, and log-probabilities, need the whole row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from generator_svc.sampling import sampler
from generator_svc.sampling.device_row import BLOCK, RELATIVE_ERROR, DeviceRow, GreedyRow
from generator_svc.sampling.random_draw import uniform
from generator_svc.sequence import SampledToken, Sampling, Sequence

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_ROUNDING = 1e-9  # of sums and exponentials in float64, with a wide margin
_SMALLEST = 1e-35  # what float32 may have taken for zero, in a block


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of a row after penalties and masks, as weights relative to the largest.

    `ids`, ascending, and their `weights`, each right to the last bit. No other token weighs more
    than `most`. The others' weights sum to between `low` and `high`, [blocks].
    """

    ids: Ids
    weights: Floats
    most: float
    low: Floats
    high: Floats

    @property
    def totals(self) -> tuple[float, float]:
        """The least and the most that all weights together may be."""
        known = self.weights.sum()
        low, high = known + self.low.sum(), known + self.high.sum()
        return float(low * (1 - _ROUNDING)), float(high * (1 + _ROUNDING))


def sample_all(
    drawing: Iterable[tuple[Sequence, sampler.Row | DeviceRow | GreedyRow]],
) -> tuple[list[tuple[Sequence, SampledToken]], list[tuple[Sequence, BaseException]]]:
    """Tokens for all, as `sampler.sample_all` has it, from rows that are here or on the device."""
    return sampler.sample_all(drawing, sample)


def sample(sequence: Sequence, logits: sampler.Row | DeviceRow | GreedyRow) -> SampledToken:
    """The next token, as `sampler.sample` has it, from a row that is here or on the device."""
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
    """The token that `sampler.sample` draws from the whole row; None if candidates do not tell."""
    sampling = sequence.generation.sampling
    if sequence.generation.top_logprobs is not None or _may_raise(sampling) or not _is_sound(row):
        return None
    forbidden = sampler.forbidden_tokens(sequence, row.size)
    is_lowered = forbidden is not None or _has_penalties(sampling)
    is_greedy = sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0
    if is_greedy and not is_lowered and row.values[0] > row.values[1]:
        return int(row.ids[0])
    ids, logits = _above_the_rest(row)
    if is_lowered:
        logits = _lowered(sequence, ids, logits, forbidden)
    if not ids.size or logits.max() <= row.values[-1]:
        return None
    if is_greedy:
        return int(ids[logits.argmax()])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        known = _weigh(row, ids, logits, sampling.temperature, is_lowered)
        draw = uniform(sampling.seed + sequence.index, sequence.generated)
        if 0 < sampling.top_k < row.size or sampling.top_p < 1 or sampling.min_p > 0:
            return _draw_from_few(known, sampling, row.size, draw)
        return _draw_from_all(known, draw)


def _may_raise(sampling: Sampling) -> bool:
    """Whether a token outside the candidates may end up above them."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty < 1
        or sampling.frequency_penalty < 0
        or sampling.presence_penalty < 0
    )


def _has_penalties(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.frequency_penalty != 0
        or sampling.presence_penalty != 0
    )


def _is_sound(row: DeviceRow) -> bool:
    """Whether all logits are numbers or -inf, and not all -inf."""
    is_sound = np.isfinite(row.values[0]) and np.isfinite(row.rest).all()
    return bool(is_sound) and not np.isnan(row.values).any()


def _above_the_rest(row: DeviceRow) -> tuple[Ids, Floats]:
    """Ids, ascending, and logits of the candidates that no other token is as likely as."""
    count = int(np.searchsorted(-row.values, -row.values[-1]))
    order = np.argsort(row.ids[:count])
    return row.ids[order], row.values[order].astype(np.float64)


def _lowered(
    sequence: Sequence, ids: Ids, logits: Floats, forbidden: sampler.Mask | None
) -> Floats:
    """The logits of `ids` with mask and penalties, computed as the sampler does."""
    sampling = sequence.generation.sampling
    row = logits.copy()
    if forbidden is not None:
        row[forbidden[ids]] = -np.inf
    if sampling.repetition_penalty != 1:
        seen, penalty = set(sequence.token_ids), sampling.repetition_penalty
        is_seen = np.array([token_id in seen for token_id in ids.tolist()])
        row = np.where(is_seen, np.where(row > 0, row / penalty, row * penalty), row)
    if sampling.frequency_penalty or sampling.presence_penalty:
        counts = np.array([sequence.output_counts[token_id] for token_id in ids.tolist()], float)
        less = sampling.frequency_penalty * counts + sampling.presence_penalty
        row = np.where(counts > 0, row - less, row)
    return row


def _weigh(
    row: DeviceRow, ids: Ids, logits: Floats, temperature: float, is_lowered: bool
) -> _Known:
    """Weights exp((logit - best) / temperature), and what the others' may be.

    The device's weight of another token is e = exp(x - values[0]) for a logit x of at most
    t = values[-1]. Up to temperature 1, exp((x - best) / temperature) / e grows with x, so that
    the sum of the e times that quotient at t bounds the sum of the weights. Above it nothing does.
    """
    best, top, last = float(logits.max()), float(row.values[0]), float(row.values[-1])
    weights = np.exp((logits - best) / temperature)
    rest = row.rest.astype(np.float64)
    if last == -np.inf:
        low = high = np.zeros(rest.size)
    elif temperature > 1:
        low, high = np.zeros(rest.size), np.full(rest.size, np.inf)
    else:
        scale = np.exp((last - best) / temperature + (top - last))
        high = (rest * (1 + RELATIVE_ERROR) + _SMALLEST) * scale
        is_exact = temperature == 1 and not is_lowered
        low = rest * (1 - RELATIVE_ERROR) * scale if is_exact else np.zeros(rest.size)
    return _Known(ids, weights, float(np.exp((last - best) / temperature)), low, high)


def _draw_from_few(known: _Known, sampling: Sampling, size: int, draw: float) -> int | None:
    """From what top_k, top_p and min_p leave, most likely first."""
    # Nothing outside weighs as much as these, so they come first in the whole row too.
    above = known.most * (1 + _ROUNDING) + 1e-300
    sure = np.flatnonzero(known.weights > above)
    order = sure[np.argsort(-known.weights[sure], kind="stable")]
    weights = known.weights[order]
    sums = np.cumsum(weights)
    if 0 < sampling.top_k < size:
        if order.size <= sampling.top_k:  # more than top_k, or it would not be a limit
            return None
        weights, sums = weights[: sampling.top_k], sums[: sampling.top_k]
        totals, above = (float(sums[-1]),) * 2, 0.0
        most = sums.size
    else:
        totals, most = known.totals, sums.size + 1
    if sampling.min_p > above:
        most = int(np.count_nonzero(weights >= sampling.min_p))
    kept = {_reach(sums, sampling.top_p, total, most) for total in totals}
    count = kept.pop()
    if kept or count > sums.size:
        return None
    return int(known.ids[order[sampler.position_of(sums[:count], draw)]])


def _reach(sums: Floats, top_p: float, total: float, most: int) -> int:
    """How many of the most likely it takes to reach `top_p` of the total; at most `most`."""
    if top_p >= 1:
        return most
    return min(int(np.searchsorted(sums, top_p * total)) + 1, most)


def _draw_from_all(known: _Known, draw: float) -> int | None:
    """The candidate in whose interval, in the order of ids, the draw falls wherever the rest is."""
    least, most = known.totals
    slack = _ROUNDING * most
    ends = np.cumsum(known.weights)
    starts = ends - known.weights
    block = known.ids // BLOCK
    # Of its own block the rest may lie all before a candidate, or all behind it.
    before = np.concatenate(([0.0], np.cumsum(known.low)))[block]
    up_to = np.cumsum(known.high)[block]
    inside = (starts + up_to + slack <= draw * least) & (draw * most < ends + before - slack)
    hits = np.flatnonzero(inside)
    return int(known.ids[hits[0]]) if hits.size else None
