"""Samples from the candidates of device rows, and decides whether they alone determine the token.

Of the other tokens, an upper bound of the logit and the sum of the weights in each block of ids are
known, at the temperature of the draw. These bound their influence:

    greedy          certain if no other token can be as likely as the most likely candidate
    top_k           certain if all top_k tokens are candidates: same arithmetic, same numbers
    top_p, min_p    certain if the cut-off is the same for every possible total weight
    none of them    certain if the draw falls into the same candidate's interval in every case

Penalties and masks are applied to the candidates first. They only lower logits, so the bounds on
the other tokens still hold.

All rows are processed together, since on a single row numpy's call overhead is ten times the
arithmetic. Each number depends on its own row alone, whatever else is in the batch.
"""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.sampling import sampler
from generator_svc.sampling.device_row import BLOCK, CANDIDATES, RELATIVE_ERROR, DeviceRow
from generator_svc.sampling.draw import MASS_ERROR
from generator_svc.sampling.random_draw import uniform
from generator_svc.sequence import ConstraintError, Sequence

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Which = Mask | slice  # selects rows

_ROUNDING = 1e-9  # a generous bound on the relative error of exponentials in float64
_SMALLEST = 1e-35  # a block sum that float32 may have flushed to zero
_NEVER = np.float32(-np.inf)
_PLACES = np.arange(CANDIDATES)  # 0 to 255, which fits into a byte


class Candidates:
    """The candidates of rows with the same vocabulary, after penalties and masks.

    `ids` and `weights`, [rows, 256], are in descending order of the logits, the lower id first on
    ties. Weights are relative to the row's largest and have the same bits as the sampler's, but are
    0 for candidates that are not above every other token. No other token weighs more than
    `max_other`. `rest`, [rows, blocks], sums the other tokens' weights by block; times `low_scale`
    and `high_scale` it bounds them, except that up to `flushed` may be missing from all blocks
    together. The total weight of a row, as the sampler sums it, is between `least` and `most`.
    """

    def __init__(self, drawing: Many[tuple[Sequence, DeviceRow]]) -> None:
        rows = [row for _, row in drawing]
        count, self.size = len(rows), rows[0].size
        ids = np.concatenate([row.ids for row in rows]).reshape(count, -1)
        values = np.concatenate([row.values for row in rows]).reshape(count, -1)
        self.rest = np.concatenate([row.rest for row in rows]).reshape(count, -1)
        masses = self.rest.sum(axis=1, dtype=np.float64)
        top, last = values[:, 0].astype(np.float64), values[:, -1].astype(np.float64)
        # A NaN or an infinite weight makes the sums non-finite.
        self.is_certain = np.isfinite(masses) & np.isfinite(top) & ~np.isnan(values).any(axis=1)
        # Excludes those equal to the last one, since other tokens may be equal to it too.
        logits = np.where(values > values[:, -1:], values, _NEVER)
        is_lowered = self._lower(drawing, ids, logits)
        ordered, self.ids = _in_order(logits, ids)

        settings = np.array([_settings(sequence, row) for sequence, row in drawing], np.float64)
        temperature, self.top_k, self.top_p, self.min_p, self.uniform, is_greedy, is_drawn = (
            settings.T
        )
        self.is_greedy = is_greedy > 0
        self.top_k[self.top_k >= self.size] = 0
        best = ordered[:, 0].astype(np.float64)
        self.is_certain &= (best > last) & (self.is_greedy | (is_drawn > 0))
        self.weights = ordered.astype(np.float64)
        self.weights -= best[:, None]
        self.weights /= temperature[:, None]
        np.exp(self.weights, out=self.weights)
        self.max_other = np.exp((last - best) / temperature)
        # The device summed exp((x - values[0]) / temperature) over the other logits x; `best`
        # differs from values[0] only if that was lowered. Penalties and masks may have lowered the
        # other logits too, so their sum may be as low as 0.
        high = np.where(last == _NEVER, 0.0, np.exp((top - best) / temperature))
        self.high_scale = high * (1 + RELATIVE_ERROR)
        self.low_scale = np.where(is_lowered, 0.0, high * (1 - RELATIVE_ERROR))
        known = self.weights.sum(axis=1)
        self.least = (known + masses * self.low_scale) * (1 - MASS_ERROR)
        self.flushed = _SMALLEST * self.rest.shape[1]
        self.most = (known + (masses + self.flushed) * self.high_scale) * (1 + MASS_ERROR)

    def draw(self) -> tuple[Ids, Mask]:
        """A token for each row, and whether it is certain to be the right one."""
        tokens, is_certain = self.ids[:, 0].copy(), self.is_certain.copy()
        is_cut = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        for draw, is_meant in ((self._draw_truncated, is_cut), (self._draw_from_all, ~is_cut)):
            is_meant &= is_certain & ~self.is_greedy
            if is_meant.any():
                rows = slice(None) if is_meant.all() else is_meant
                tokens[rows], is_certain[rows] = draw(rows)
        return tokens, is_certain

    def _lower(self, drawing: Many[tuple[Sequence, DeviceRow]], ids: Ids, logits: Logits) -> Mask:
        """Applies masks and penalties to `logits` in place, with the sampler's own arithmetic.

        Each penalty rounds to float32. Returns the mask of rows that have any of them.
        """
        is_lowered = np.zeros(len(drawing), np.bool_)
        repeated, penalties, counted = [], [], []
        for number, (sequence, _) in enumerate(drawing):
            try:
                forbidden = sampler.forbidden_tokens(sequence, self.size)
            except ConstraintError:  # the sampler will raise it again
                self.is_certain[number] = False
                continue
            sampling = sequence.request.sampling
            is_lowered[number] = forbidden is not None or sampling.has_bias_or_penalties
            if forbidden is not None:
                logits[number, forbidden[ids[number]]] = _NEVER
            if sampling.repetition_penalty != 1:
                repeated.append(number)
                penalties.append(sampling.repetition_penalty)
            if sampling.frequency_penalty or sampling.presence_penalty:
                counted.append(number)
        if repeated:
            seen = [
                np.frombuffer(drawing[number][0].seen_tokens(self.size), np.bool_)[ids[number]]
                for number in repeated
            ]
            before = logits[repeated]
            after = sampler.after_repetition(
                before.astype(np.float64), np.array(penalties)[:, None]
            )
            logits[repeated] = np.where(seen, after.astype(np.float32), before)
        for number in counted:
            sequence, row = drawing[number][0], logits[number]
            sampling, counts = sequence.request.sampling, sequence.output_counts
            times = np.array([counts.get(token_id, 0) for token_id in ids[number].tolist()])
            less = sampling.frequency_penalty * times + sampling.presence_penalty
            after = (row.astype(np.float64) - less).astype(np.float32)
            logits[number] = np.where(times > 0, after, row)
        return is_lowered

    def _draw_truncated(self, rows: Which) -> tuple[Ids, Mask]:
        """Draws from the tokens that top_k, top_p and min_p keep, most likely first."""
        weights, top_k = self.weights[rows], self.top_k[rows].astype(np.int64)
        top_p, min_p = self.top_p[rows], self.min_p[rows]
        sums = weights.cumsum(axis=1)
        # No other token weighs as much as these, so they come first in the whole sorted row too.
        above = self.max_other[rows] * (1 + _ROUNDING) + 1e-300
        sure = (weights > above[:, None]).sum(axis=1)
        has_top_k = top_k > 0
        is_certain = ~has_top_k | (sure > top_k)  # the top_k tokens and the next one are known
        length = np.where(has_top_k, top_k, sure)
        # Without top_k, one more than is known: if it is reached, other tokens may be kept too.
        limit = np.where(has_top_k, top_k, sure + 1)
        is_known = length[:, None] > _PLACES
        has_min_p = min_p > np.where(has_top_k, 0.0, above)
        if has_min_p.any():
            passing = (is_known & (weights >= min_p[:, None])).sum(axis=1)
            limit = np.where(has_min_p, passing, limit)
        kth = sums[np.arange(len(sums)), np.minimum(top_k, CANDIDATES) - 1]
        count, most = (
            self._nucleus(
                np.where(has_top_k, kth, total[rows]) * top_p, top_p, sums, is_known, limit
            )
            for total in (self.least, self.most)
        )
        is_certain &= (count == most) & (count > 0) & (count <= length)
        count = np.minimum(np.maximum(count, 1), CANDIDATES)
        place = _positions(sums, count, self.uniform[rows])
        return self.ids[rows][np.arange(len(sums)), place], is_certain

    @staticmethod
    def _nucleus(reached: Floats, top_p: Floats, sums: Floats, is_known: Mask, limit: Ids) -> Ids:
        """How many of the most likely tokens are needed to reach top_p of the total."""
        count = (is_known & (sums < reached[:, None])).sum(axis=1) + 1
        return np.where(top_p >= 1, limit, np.minimum(count, limit))

    def _draw_from_all(self, rows: Which) -> tuple[Ids, Mask]:
        """The candidates whose intervals the draws hit, whatever the other tokens' exact weights.

        Intervals are in the order of ids, as in the sampler: other tokens with lower ids shift a
        candidate's interval by an amount between `before` and `up_to`.
        """
        keys = (self.ids[rows] << 8) + _PLACES
        keys.sort(axis=1)
        ids, weights = keys >> 8, _pick(self.weights[rows], keys & 0xFF)
        draw = self.uniform[rows, None]
        least, most = self.least[rows, None], self.most[rows, None]
        slack = MASS_ERROR * most
        ends = weights.cumsum(axis=1)
        block = ids // BLOCK
        # The other tokens of a candidate's block may all precede it, or all follow it.
        rest = self.rest[rows]
        sums = _pick(rest.cumsum(axis=1, dtype=np.float64), block)
        before = (sums - _pick(rest, block)) * self.low_scale[rows, None]
        up_to = (sums + self.flushed) * self.high_scale[rows, None]
        is_hit = ends - weights + up_to + slack <= draw * least
        is_hit &= draw * most < ends + before - slack
        place = is_hit.argmax(axis=1)
        return ids[np.arange(len(ids)), place], is_hit.any(axis=1)


def _settings(sequence: Sequence, row: DeviceRow) -> tuple[float, ...]:
    """The parameters of a draw: temperature, top_k, top_p, min_p, uniform number in [0, 1), whether
    it is greedy, and whether the row's candidates can be used if it is not."""
    sampling, draw = sequence.request.sampling, 0.0
    # top_n_sigma needs the standard deviation of all logits.
    is_drawn = sampling.temperature == row.temperature and sampling.top_n_sigma <= 0
    if not sampling.is_greedy:
        draw = uniform(sampling.seed + sequence.index, sequence.generated)
    cuts = sampling.top_k, sampling.top_p, sampling.min_p
    return sampling.temperature, *cuts, draw, sampling.is_greedy, is_drawn


def _in_order(logits: Logits, ids: Ids) -> tuple[Logits, Ids]:
    """Sorts both by descending logits, the lower id first on ties. No logit may be NaN."""
    # Read as integers, floats sort correctly once all bits but the sign of negative ones are
    # flipped; with the id in the lower bits, one integer sort suffices. The logits are negated for
    # descending order; 0 - x also makes -0 and 0 equal.
    bits = (0 - logits).view(np.int32).astype(np.int64)
    bits ^= (bits >> 63) & 0x7FFFFFFF
    keys = (bits << 32) + ids
    keys.sort(axis=1)
    bits = keys >> 32
    bits ^= (bits >> 63) & 0x7FFFFFFF
    return -bits.astype(np.int32).view(np.float32), keys & 0xFFFFFFFF


def _pick(array: npt.NDArray[Any], places: Ids) -> npt.NDArray[Any]:
    """The elements of each row at its `places`: np.take_along_axis in a fraction of its time."""
    rows, width = array.shape
    picked: npt.NDArray[Any] = array.ravel().take(places + width * np.arange(rows)[:, None])
    return picked


def _positions(sums: Floats, count: Ids, draw: Floats) -> Ids:
    """`draw.position_of` for the first `count` sums of each row."""
    is_kept = count[:, None] > _PLACES
    total = sums[np.arange(count.size), count - 1]
    index: Ids = (is_kept & (sums <= (draw * total)[:, None])).sum(axis=1)
    if (index < count).all():
        return index
    # Rounding reached the total itself: take the last index with any weight.
    last: Ids = (is_kept & (sums < total[:, None])).sum(axis=1)
    return np.where(index < count, index, last)
