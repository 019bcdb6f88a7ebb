"""Draws from the candidates of device rows, and tells where these alone decide.

What is known of the other tokens, their largest possible logit and the sum of their weights in
every block of ids, at the temperature of the draw, bounds their influence:

    greedy          the most likely candidate, if no token outside can be as likely
    top_k           the same arithmetic on the same numbers, if all top_k are candidates
    top_p, min_p    likewise, if every possible total truncates at the same candidate
    none of them    if the draw falls into one candidate's interval, wherever the rest lies

Penalties and masks are applied to the candidates first: they only lower logits, so the bounds on
the rest still hold.

All rows are looked at together: numpy's calls on one row take ten times as long as their
arithmetic. Each number is computed from its own row alone, whatever stands beside it.
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
Which = Mask | slice  # of the rows

_ROUNDING = 1e-9  # relative error of exponentials in float64, generously
_SMALLEST = 1e-35  # a block sum that float32 may have flushed to zero
_NEVER = np.float32(-np.inf)
_PLACES = np.arange(CANDIDATES)  # 256: a byte


class Candidates:
    """The candidates of rows of one vocabulary, after penalties and masks.

    `ids` and `weights`, [rows, 256], are in the order of the logits, the lower id first among
    equals. Weights are relative to the row's largest one and exact to the last bit, but 0 for
    candidates that are not above every other token. No other token weighs more than `max_other`.
    The others' sums in `rest`, [rows, blocks], of which all blocks together may lack `flushed`,
    times `low_scale` and `high_scale` are bounds on their weights; all weights of a row, as the
    sampler adds them up, are between `least` and `most`.
    """

    def __init__(self, drawing: Many[tuple[Sequence, DeviceRow]]) -> None:
        rows = [row for _, row in drawing]
        count, self.size = len(rows), rows[0].size
        ids = np.concatenate([row.ids for row in rows]).reshape(count, -1)
        values = np.concatenate([row.values for row in rows]).reshape(count, -1)
        self.rest = np.concatenate([row.rest for row in rows]).reshape(count, -1)
        masses = self.rest.sum(axis=1, dtype=np.float64)
        top, last = values[:, 0].astype(np.float64), values[:, -1].astype(np.float64)
        # With one NaN, or an infinite mass, the sums are not finite.
        self.is_certain = np.isfinite(masses) & np.isfinite(top) & ~np.isnan(values).any(axis=1)
        # Those equal to the last one are left out: a token outside may be equal to them too.
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
        # differs from that only if it was lowered. Penalties and masks can take all from them.
        high = np.where(last == _NEVER, 0.0, np.exp((top - best) / temperature))
        self.high_scale = high * (1 + RELATIVE_ERROR)
        self.low_scale = np.where(is_lowered, 0.0, high * (1 - RELATIVE_ERROR))
        known = self.weights.sum(axis=1)
        self.least = (known + masses * self.low_scale) * (1 - MASS_ERROR)
        self.flushed = _SMALLEST * self.rest.shape[1]
        self.most = (known + (masses + self.flushed) * self.high_scale) * (1 + MASS_ERROR)

    def draw(self) -> tuple[Ids, Mask]:
        """A token for each row, and whether it is certain."""
        tokens, is_certain = self.ids[:, 0].copy(), self.is_certain.copy()
        is_cut = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        for draw, is_meant in ((self._draw_truncated, is_cut), (self._draw_from_all, ~is_cut)):
            is_meant &= is_certain & ~self.is_greedy
            if is_meant.any():
                rows = slice(None) if is_meant.all() else is_meant
                tokens[rows], is_certain[rows] = draw(rows)
        return tokens, is_certain

    def _lower(self, drawing: Many[tuple[Sequence, DeviceRow]], ids: Ids, logits: Logits) -> Mask:
        """Applies masks and penalties, by the sampler's own arithmetic; returns whose logits.

        Each penalty leaves float32.
        """
        is_lowered = np.zeros(len(drawing), np.bool_)
        repeated, penalties, counted = [], [], []
        for number, (sequence, _) in enumerate(drawing):
            try:
                forbidden = sampler.forbidden_tokens(sequence, self.size)
            except ConstraintError:  # which the sampler meets again
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
        """Draws from what top_k, top_p and min_p keep, most likely first."""
        weights, top_k = self.weights[rows], self.top_k[rows].astype(np.int64)
        top_p, min_p = self.top_p[rows], self.min_p[rows]
        sums = weights.cumsum(axis=1)
        # Nothing else weighs as much as these, so they come first in the sorted whole row too.
        above = self.max_other[rows] * (1 + _ROUNDING) + 1e-300
        sure = (weights > above[:, None]).sum(axis=1)
        has_top_k = top_k > 0
        is_certain = ~has_top_k | (sure > top_k)  # more than top_k, or it would not be a limit
        length = np.where(has_top_k, top_k, sure)
        # Without top_k one more than is known: reaching it means that others may be kept too.
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
        """How many of the most likely tokens reach top_p of the total."""
        count = (is_known & (sums < reached[:, None])).sum(axis=1) + 1
        return np.where(top_p >= 1, limit, np.minimum(count, limit))

    def _draw_from_all(self, rows: Which) -> tuple[Ids, Mask]:
        """The candidates into whose intervals the draws fall, wherever the rest lies.

        Intervals are in the order of ids, as in the sampler: the tokens before a candidate move its
        interval by some amount between `before` and `up_to`.
        """
        keys = (self.ids[rows] << 8) + _PLACES
        keys.sort(axis=1)
        ids, weights = keys >> 8, _pick(self.weights[rows], keys & 0xFF)
        draw = self.uniform[rows, None]
        least, most = self.least[rows, None], self.most[rows, None]
        slack = MASS_ERROR * most
        ends = weights.cumsum(axis=1)
        block = ids // BLOCK
        # The rest of its own block may lie entirely before a candidate, or entirely after it.
        rest = self.rest[rows]
        sums = _pick(rest.cumsum(axis=1, dtype=np.float64), block)
        before = (sums - _pick(rest, block)) * self.low_scale[rows, None]
        up_to = (sums + self.flushed) * self.high_scale[rows, None]
        is_hit = ends - weights + up_to + slack <= draw * least
        is_hit &= draw * most < ends + before - slack
        place = is_hit.argmax(axis=1)
        return ids[np.arange(len(ids)), place], is_hit.any(axis=1)


def _settings(sequence: Sequence, row: DeviceRow) -> tuple[float, ...]:
    """Of a draw: temperature, top_k, top_p, min_p, number in [0, 1), whether it is greedy, and
    whether candidates at the row's temperature can serve it otherwise."""
    sampling, draw = sequence.request.sampling, 0.0
    # top_n_sigma needs the deviation of all logits.
    is_drawn = sampling.temperature == row.temperature and sampling.top_n_sigma <= 0
    if not sampling.is_greedy:
        draw = uniform(sampling.seed + sequence.index, sequence.generated)
    cuts = sampling.top_k, sampling.top_p, sampling.min_p
    return sampling.temperature, *cuts, draw, sampling.is_greedy, is_drawn


def _in_order(logits: Logits, ids: Ids) -> tuple[Logits, Ids]:
    """Both in descending order of the logits, the lower id first among equals; no NaN."""
    # Bits of a float, the other way round below zero, are in its order; with the id behind them one
    # sort of integers does. Adding 0 makes -0 and 0 equal.
    bits = (0 - logits).view(np.int32).astype(np.int64)
    bits ^= (bits >> 63) & 0x7FFFFFFF
    keys = (bits << 32) + ids
    keys.sort(axis=1)
    bits = keys >> 32
    bits ^= (bits >> 63) & 0x7FFFFFFF
    return -bits.astype(np.int32).view(np.float32), keys & 0xFFFFFFFF


def _pick(array: npt.NDArray[Any], places: Ids) -> npt.NDArray[Any]:
    """np.take_along_axis in a fraction of its time: of each row the elements at its places."""
    rows, width = array.shape
    picked: npt.NDArray[Any] = array.ravel().take(places + width * np.arange(rows)[:, None])
    return picked


def _positions(sums: Floats, count: Ids, draw: Floats) -> Ids:
    """`draw.position_of` for each row, of its first `count` sums."""
    is_kept = count[:, None] > _PLACES
    total = sums[np.arange(count.size), count - 1]
    index: Ids = (is_kept & (sums <= (draw * total)[:, None])).sum(axis=1)
    if (index < count).all():
        return index
    # Rounding reached the total itself: the last index with any weight.
    last: Ids = (is_kept & (sums < total[:, None])).sum(axis=1)
    return np.where(index < count, index, last)
