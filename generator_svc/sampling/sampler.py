"""Sampling on the host. Rows are processed one by one, so a token never depends on its batch.

The order is: raw log-probabilities (the ones reported), logit bias, mask (of the constraint and of
min_new_tokens), repetition penalty, frequency and presence penalty, top_n_sigma, temperature,
top_k, top_p, min_p, draw.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.sampling.random_draw import uniform
from generator_svc.sequence import (
    ConstraintError,
    SampledToken,
    SamplingParams,
    Sequence,
    TokenLogprobs,
)

HostRow = npt.NDArray[np.float32]  # logits [vocabulary]
Mask = npt.NDArray[np.bool_]  # [vocabulary]

MIN_LOGPROB = -9999.0  # reported for a probability of zero; JSON has no infinity
_MIN_REPETITION_PENALTY = 1e-6
_INITIAL_CANDIDATES = 256  # of top_p and min_p, before looking at more
_BLOCK = 256


class BadLogits(ArithmeticError):
    """The model's logits are NaN, or no token can be drawn."""


def sample(sequence: Sequence, logits: HostRow) -> SampledToken:
    """The next token of `sequence` from `logits`, which are not modified.

    Raises BadLogits or ConstraintError. Does not advance the constraint's state.
    """
    request = sequence.request
    best = int(logits.argmax())
    if not math.isfinite(logits[best]):  # arg max stops at the first NaN
        raise BadLogits("the model's logits are not finite")
    sampling = request.sampling
    forbidden = forbidden_tokens(sequence, logits.size)
    if sampling.is_plain_greedy and (forbidden is None or not forbidden[best]):
        token_id = best
    else:
        row = _adjusted(sequence, logits, forbidden)
        ids = _allowed_if_few(forbidden)
        if ids is not None:
            row = row[ids]
        position = _draw(row, sampling, sequence.index, sequence.generated)
        token_id = position if ids is None else int(ids[position])
    if request.top_logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, _logprobs(logits, token_id, request.top_logprobs))


def forbidden_tokens(sequence: Sequence, size: int) -> Mask | None:
    """Mask of the tokens that may not be drawn, bool [vocabulary]; None if all may.

    Where a constraint allows only end tokens, these may be drawn in spite of min_new_tokens and
    ignore_eos: a complete text ends.
    """
    request = sequence.request
    constraint = request.constraint
    withheld: frozenset[int] = frozenset()
    if sequence.generated < request.min_new_tokens:
        withheld = request.all_stop_token_ids
    elif constraint is not None:
        withheld = constraint.end_token_ids - request.stop_token_ids
    if constraint is None:
        return _mask_of(withheld, size) if withheld else None
    if sequence.constraint_state is None:
        sequence.constraint_state = constraint.new_state()
    forbidden: Mask = ~sequence.constraint_state.allowed()
    if withheld:
        both = forbidden | _mask_of(withheld, size)
        return forbidden if both.all() else both
    return forbidden


def _allowed_if_few(forbidden: Mask | None) -> npt.NDArray[np.intp] | None:
    """Ids of the allowed tokens, if they are so few that sampling from them alone is faster."""
    if forbidden is None or 4 * np.count_nonzero(forbidden) < 3 * forbidden.size:
        return None
    ids = np.flatnonzero(~forbidden)
    return ids if ids.size else None


def _mask_of(ids: Iterable[int], size: int) -> Mask:
    mask = np.zeros(size, np.bool_)
    mask[list(ids)] = True
    return mask


def _logprobs(logits: HostRow, token_id: int, top: int) -> TokenLogprobs:
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    np.maximum(row, MIN_LOGPROB, out=row)
    ids = _most_likely(row, top)
    return TokenLogprobs(float(row[token_id]), tuple(ids.tolist()), tuple(row[ids].tolist()))


def _most_likely(row: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Ids of the `count` largest values in descending order, the lower id first among equals."""
    if count == 0:
        return np.empty(0, dtype=np.intp)
    if count >= row.size:
        return np.argsort(-row, kind="stable")
    threshold = np.partition(row, row.size - count)[row.size - count]
    ids = np.flatnonzero(row >= threshold)  # ascending; more than `count` only if some are equal
    return ids[np.argsort(-row[ids], kind="stable")][:count]


def _adjusted(
    sequence: Sequence, logits: HostRow, forbidden: Mask | None
) -> npt.NDArray[np.float64]:
    """A float64 copy of the logits with bias, mask and penalties applied."""
    sampling = sequence.request.sampling
    row = logits.astype(np.float64)
    if sampling.logit_bias:
        row[list(sampling.logit_bias)] += list(sampling.logit_bias.values())
    if forbidden is not None:
        row[forbidden] = -np.inf
    if sampling.repetition_penalty != 1:
        seen = np.fromiter(set(sequence.token_ids), dtype=np.intp)
        # Much smaller ones change nothing any more, and a quotient could become infinite.
        penalty = max(sampling.repetition_penalty, _MIN_REPETITION_PENALTY)
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if sequence.output_counts and (sampling.frequency_penalty or sampling.presence_penalty):
        ids = np.fromiter(sequence.output_counts.keys(), dtype=np.intp)
        counts = np.fromiter(sequence.output_counts.values(), dtype=np.float64)
        row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return row


def _draw(row: npt.NDArray[np.float64], sampling: SamplingParams, index: int, position: int) -> int:
    best = int(row.argmax())
    if not np.isfinite(row[best]):
        raise BadLogits("no token is left that could be drawn")
    if sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0:
        return best
    if sampling.top_n_sigma > 0:
        row = _near_the_best(row, sampling.top_n_sigma)
    with np.errstate(over="ignore"):  # with a tiny temperature -inf is the right result
        weights = np.exp((row - row[best]) / sampling.temperature)
    draw = uniform(sampling.seed + index, position)
    if sampling.top_p >= 1 and sampling.min_p == 0 and not 0 < sampling.top_k < row.size:
        return _draw_from_all(weights, draw)
    ids = _candidates(weights, sampling)
    cumulative = np.cumsum(weights[ids])
    return int(ids[position_of(cumulative, draw)])


def _near_the_best(row: npt.NDArray[np.float64], deviations: float) -> npt.NDArray[np.float64]:
    """The row without the tokens that are further than so many standard deviations below the best.

    As llama.cpp has it, masked tokens do not count for the deviation, and the filter comes after
    the penalties and before top_k. Temperature scales both sides, so it may come before or after.
    """
    spread = row[np.isfinite(row)].std()
    return np.where(row < row.max() - deviations * spread, -np.inf, row)


def _draw_from_all(weights: npt.NDArray[np.float64], draw: float) -> int:
    """Inverse transform sampling in two steps: a block of tokens, then the token in it."""
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
    """The first index whose cumulative weight exceeds `draw` of the total."""
    index = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    # Rounding may reach the total itself; then the last index with any weight.
    return min(index, int(np.searchsorted(cumulative, cumulative[-1])))


def _candidates(weights: npt.NDArray[np.float64], sampling: SamplingParams) -> npt.NDArray[np.intp]:
    """Ids that top_k, top_p and min_p keep, most likely first; at least one."""
    has_top_k = 0 < sampling.top_k < weights.size
    count = sampling.top_k if has_top_k else _INITIAL_CANDIDATES
    while True:
        ids = _most_likely(weights, min(count, weights.size))
        sums = np.cumsum(weights[ids])
        total = sums[-1] if has_top_k else weights.sum()
        enough = has_top_k or count >= weights.size or sums[-1] >= sampling.top_p * total
        min_weight = sampling.min_p  # the largest weight is 1
        if enough or weights[ids[-1]] < min_weight:
            break
        count *= 8
    if sampling.top_p < 1:
        ids = ids[: int(np.searchsorted(sums, sampling.top_p * total)) + 1]
    if min_weight > 0:
        ids = ids[weights[ids] >= min_weight]
    return ids


def sample_all(
    drawing: Iterable[tuple[Sequence, Any]],
    draw: Callable[[Sequence, Any], SampledToken] = sample,
) -> tuple[list[tuple[Sequence, SampledToken]], list[tuple[Sequence, BaseException]]]:
    """Tokens for all sequences, and the errors of those with bad logits or constraints.

    `draw` samples one token; a replacement for `sample` may accept other kinds of rows.
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
