"""From logits to tokens. Each row is worked on alone, so its token never depends on its batch.

The order is: raw log-probabilities (those are reported), logit bias, mask (the constraint's and
that of min_new_tokens), repetition penalty, frequency and presence penalty, temperature, top_k,
top_p, min_p, draw.
Knows nothing about slots, steps or text.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.sampling.random_draw import uniform
from generator_svc.sequence import ConstraintError, Logprobs, SampledToken, Sampling, Sequence

Row = npt.NDArray[np.float32]  # [vocabulary]
Mask = npt.NDArray[np.bool_]  # [vocabulary]

IMPOSSIBLE = -9999.0  # reported for a probability of zero; JSON has no infinity
_FIRST_CANDIDATES = 256
_BLOCK = 256


class BadLogits(ArithmeticError):
    """The model gave NaN, or nothing that can be drawn."""


def sample(sequence: Sequence, logits: Row) -> SampledToken:
    """The next token of `sequence` from `logits`, which are not changed.

    Raises BadLogits or ConstraintError. A constraint's state is left before the token.
    """
    generation = sequence.generation
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):  # arg max stops at the first NaN
        raise BadLogits("the model's logits are not finite")
    sampling = generation.sampling
    forbidden = forbidden_tokens(sequence, logits.size)
    if sampling.is_plain_greedy and (forbidden is None or not forbidden[best]):
        token_id = best
    else:
        row = _adjusted(sequence, logits, forbidden)
        ids = _few_allowed(forbidden)
        if ids is not None:
            row = row[ids]
        place = _choose(row, sampling, sequence.index, sequence.generated)
        token_id = place if ids is None else int(ids[place])
    if generation.top_logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, _report(logits, token_id, generation.top_logprobs))


def forbidden_tokens(sequence: Sequence, size: int) -> Mask | None:
    """Tokens that may not be drawn now, bool [vocabulary]; None when there are none.

    Where a constraint leaves nothing but tokens that end the text, these may be drawn, although
    min_new_tokens or ignore_eos holds them back: a complete text ends.
    """
    generation = sequence.generation
    constraint = generation.constraint
    held: frozenset[int] = frozenset()
    if sequence.generated < generation.min_new_tokens:
        held = generation.all_stop_token_ids
    elif constraint is not None:
        held = constraint.end_token_ids - generation.stop_token_ids
    if constraint is None:
        return _mask_of(held, size) if held else None
    if sequence.constraint_state is None:
        sequence.constraint_state = constraint.new_state()
    forbidden: Mask = ~sequence.constraint_state.allowed()
    if held:
        both = forbidden | _mask_of(held, size)
        return forbidden if both.all() else both
    return forbidden


def _few_allowed(forbidden: Mask | None) -> npt.NDArray[np.intp] | None:
    """Ids of the tokens that are allowed, if it is quicker to look at these alone."""
    if forbidden is None or 4 * np.count_nonzero(forbidden) < 3 * forbidden.size:
        return None
    ids = np.flatnonzero(~forbidden)
    return ids if ids.size else None


def _mask_of(ids: Iterable[int], size: int) -> Mask:
    mask = np.zeros(size, np.bool_)
    mask[list(ids)] = True
    return mask


def _report(logits: Row, token_id: int, top: int) -> Logprobs:
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    np.maximum(row, IMPOSSIBLE, out=row)
    ids = _most_likely(row, top)
    return Logprobs(float(row[token_id]), tuple(ids.tolist()), tuple(row[ids].tolist()))


def _most_likely(row: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Ids of the `count` largest, largest first, the lower id first among equals."""
    if count == 0:
        return np.empty(0, dtype=np.intp)
    if count >= row.size:
        return np.argsort(-row, kind="stable")
    threshold = np.partition(row, row.size - count)[row.size - count]
    ids = np.flatnonzero(row >= threshold)  # ascending; more than `count` only among equals
    return ids[np.argsort(-row[ids], kind="stable")][:count]


def _adjusted(sequence: Sequence, logits: Row, forbidden: Mask | None) -> npt.NDArray[np.float64]:
    """A copy of the logits with bias, mask and penalties applied."""
    sampling = sequence.generation.sampling
    row = logits.astype(np.float64)
    if sampling.logit_bias:
        row[list(sampling.logit_bias)] += list(sampling.logit_bias.values())
    if forbidden is not None:
        row[forbidden] = -np.inf
    if sampling.repetition_penalty != 1:
        seen = np.fromiter(set(sequence.token_ids), dtype=np.intp)
        penalty = sampling.repetition_penalty
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if sequence.output_counts and (sampling.frequency_penalty or sampling.presence_penalty):
        ids = np.fromiter(sequence.output_counts.keys(), dtype=np.intp)
        counts = np.fromiter(sequence.output_counts.values(), dtype=np.float64)
        row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return row


def _choose(row: npt.NDArray[np.float64], sampling: Sampling, index: int, position: int) -> int:
    best = int(row.argmax())
    if not np.isfinite(row[best]):
        raise BadLogits("no token is left that could be drawn")
    if sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0:
        return best
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is what is meant
        weights = np.exp((row - row[best]) / sampling.temperature)
    draw = uniform(sampling.seed + index, position)
    if sampling.top_p >= 1 and sampling.min_p == 0 and not 0 < sampling.top_k < row.size:
        return _draw_from_all(weights, draw)
    ids = _candidates(weights, sampling)
    cumulative = np.cumsum(weights[ids])
    return int(ids[position_of(cumulative, draw)])


def _draw_from_all(weights: npt.NDArray[np.float64], draw: float) -> int:
    """Inverse of the distribution function: first the block of tokens, then the token in it."""
    whole = weights.size - weights.size % _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    cumulative = np.cumsum(np.append(sums, weights[whole:].sum()))
    block = position_of(cumulative, draw)
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK])
    before = cumulative[block - 1] if block else 0.0
    within = (draw * cumulative[-1] - before) / inside[-1]
    return start + position_of(inside, min(max(within, 0.0), np.nextafter(1.0, 0.0)))


def position_of(cumulative: npt.NDArray[np.float64], draw: float) -> int:
    """The first place whose cumulative weight exceeds `draw` of the total."""
    place = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    # Rounding may reach the total itself; then the last place that has any weight.
    return min(place, int(np.searchsorted(cumulative, cumulative[-1])))


def _candidates(weights: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.intp]:
    """Ids that top_k, top_p and min_p leave, most likely first; at least one."""
    has_top_k = 0 < sampling.top_k < weights.size
    count = sampling.top_k if has_top_k else _FIRST_CANDIDATES
    while True:
        ids = _most_likely(weights, min(count, weights.size))
        sums = np.cumsum(weights[ids])
        total = sums[-1] if has_top_k else weights.sum()
        enough = has_top_k or count >= weights.size or sums[-1] >= sampling.top_p * total
        least = sampling.min_p  # the largest weight is 1
        if enough or weights[ids[-1]] < least:
            break
        count *= 8
    if sampling.top_p < 1:
        ids = ids[: int(np.searchsorted(sums, sampling.top_p * total)) + 1]
    if least > 0:
        ids = ids[weights[ids] >= least]
    return ids


def sample_all(
    drawing: Iterable[tuple[Sequence, Any]],
    draw: Callable[[Sequence, Any], SampledToken] = sample,
) -> tuple[list[tuple[Sequence, SampledToken]], list[tuple[Sequence, BaseException]]]:
    """Tokens for all, and the failures of those whose logits or constraints were bad.

    `draw` draws one; another than `sample` may know other kinds of rows.
    """
    tokens: list[tuple[Sequence, SampledToken]] = []
    failures: list[tuple[Sequence, BaseException]] = []
    for sequence, logits in drawing:
        try:
            token = draw(sequence, logits)
            if sequence.constraint_state is not None:
                sequence.constraint_state.accept(token.token_id)
        except (BadLogits, ConstraintError) as error:
            failures.append((sequence, error))
        else:
            tokens.append((sequence, token))
    return tokens, failures
