"""Sampling on the host. Rows are processed one by one, so a token never depends on the batch.

The order is: raw log-probabilities (the ones reported), logit bias, mask (of allowed_token_ids,
bad words, the constraint and min_new_tokens), repetition penalty, frequency and presence penalty,
top_n_sigma, temperature, top_k, top_p, min_p, draw. Bias and penalties are computed in float64 and
rounded to float32.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.sampling.draw import BadLogits, checked, draw, most_likely
from generator_svc.sampling.random_draw import uniform
from generator_svc.sequence import (
    ConstraintError,
    SampledToken,
    Sequence,
    TokenLogprobs,
)

HostRow = npt.NDArray[np.float32]  # logits [vocabulary]
Mask = npt.NDArray[np.bool_]  # [vocabulary]

MIN_LOGPROB = -9999.0  # reported for a probability of zero; JSON has no infinity
_MIN_REPETITION_PENALTY = 1e-6


def sample(sequence: Sequence, logits: HostRow) -> SampledToken:
    """The next token of `sequence` from `logits`, which are not modified.

    Raises BadLogits or ConstraintError. Does not advance the constraint's state.
    """
    request = sequence.request
    forbidden = forbidden_tokens(sequence, logits.size)
    token_id = None
    if request.sampling.is_plain_greedy:
        token_id = _arg_max(logits)
    if token_id is None or (forbidden is not None and forbidden[token_id]):
        token_id = _draw(sequence, logits, forbidden)
    if request.top_logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, logprobs(logits, token_id, request.top_logprobs))


def forbidden_tokens(sequence: Sequence, size: int) -> Mask | None:
    """Mask of the tokens that may not be sampled, bool [vocabulary]; None if all are allowed.

    If no token is left, a complete constrained text may end all the same, in spite of
    min_new_tokens, ignore_eos, allowed_token_ids and bad words; otherwise this raises
    ConstraintError.
    """
    request = sequence.request
    if not request.has_masks and sequence.generated >= request.min_new_tokens:
        return None
    constraint = request.constraint
    withheld: frozenset[int] = frozenset()
    if sequence.generated < request.min_new_tokens:
        withheld = request.all_stop_token_ids
    elif constraint is not None:
        withheld = constraint.end_token_ids - request.stop_token_ids
    excluded = _excluded_by_caller(sequence, size)
    if constraint is None:
        if excluded is None:
            return _mask_of(withheld, size) if withheld else None
        excluded[list(withheld)] = True
        if excluded.all():
            raise _no_token_left(sequence)
        return excluded
    if sequence.constraint_state is None:
        sequence.constraint_state = constraint.new_state()
    unfit: Mask = ~sequence.constraint_state.allowed()
    forbidden = unfit if excluded is None else unfit | excluded
    if withheld:
        both = forbidden | _mask_of(withheld, size)
        if not both.all():
            return both
    if excluded is not None and forbidden.all():
        forbidden = unfit | ~_mask_of(constraint.end_token_ids, size)
        if forbidden.all():
            raise _no_token_left(sequence)
    return forbidden


def _excluded_by_caller(sequence: Sequence, size: int) -> Mask | None:
    """Mask of the tokens that allowed_token_ids and bad words exclude; None if there is none."""
    request = sequence.request
    allowed = request.sampling.allowed_token_ids
    last_of_bad_words: list[int] = []
    for length, ends in request.bad_word_ends.items():
        if length <= sequence.generated:
            before = tuple(sequence.token_ids[len(sequence.token_ids) - length :])
            last_of_bad_words += ends.get(before, ())
    if not (allowed or last_of_bad_words):
        return None
    mask = np.full(size, bool(allowed))
    if allowed:
        mask[np.frombuffer(allowed, np.int64)] = False
    mask[last_of_bad_words] = True
    return mask


def _no_token_left(sequence: Sequence) -> ConstraintError:
    has_list = bool(sequence.request.sampling.allowed_token_ids)
    message = (
        f"The '{'allowed_token_ids' if has_list else 'bad_words'}' parameter, together with the "
        "request's other parameters, leaves no token to generate after "
        f"{sequence.generated} tokens."
    )
    param = "sampling.allowed_token_ids" if has_list else "bad_words"
    return ConstraintError("invalid_parameter_combination", message, param)


def _allowed_if_few(forbidden: Mask | None) -> npt.NDArray[np.intp] | None:
    """Ids of the allowed tokens if they are few enough that sampling from them alone is faster."""
    if forbidden is None or 4 * np.count_nonzero(forbidden) < 3 * forbidden.size:
        return None
    ids = np.flatnonzero(~forbidden)
    return ids if ids.size else None


def _mask_of(ids: Iterable[int], size: int) -> Mask:
    mask = np.zeros(size, np.bool_)
    mask[list(ids)] = True
    return mask


def logprobs(logits: HostRow, token_id: int, top: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the `top` most likely ones, from a row of raw logits."""
    row = logits.astype(np.float64)
    row -= row.max()
    total = np.log(np.exp(row).sum())
    ids = most_likely(logits, top)
    reported = np.maximum(row[[token_id, *ids]] - total, MIN_LOGPROB).tolist()
    return TokenLogprobs(reported[0], tuple(ids.tolist()), tuple(reported[1:]))


@np.errstate(over="ignore", under="ignore")  # a weight of zero is the right result
def _draw(sequence: Sequence, logits: HostRow, forbidden: Mask | None) -> int:
    """A token sampled by the request's parameters."""
    if forbidden is not None:
        _arg_max(logits)  # raises BadLogits, as the mask might hide a logit that is not finite
    sampling = sequence.request.sampling
    row = _adjusted(sequence, logits, forbidden)
    ids = _allowed_if_few(forbidden)
    if ids is not None:
        row = row[ids]
    if sampling.is_greedy:
        place = _arg_max(row)
    else:
        place = draw(row, sampling, uniform(sampling.seed + sequence.index, sequence.generated))
    return place if ids is None else int(ids[place])


def _arg_max(row: HostRow) -> int:
    best = int(row.argmax())
    checked(float(row[best]))  # argmax returns the first NaN if there is one
    return best


def _adjusted(sequence: Sequence, logits: HostRow, forbidden: Mask | None) -> HostRow:
    """The logits with bias, mask and penalties applied: a copy, unless there are none."""
    sampling = sequence.request.sampling
    if forbidden is None and not sampling.has_bias_or_penalties:
        return logits
    row = logits.copy()
    if sampling.logit_bias:
        row[list(sampling.logit_bias)] += np.array(list(sampling.logit_bias.values()))
    if forbidden is not None:
        np.copyto(row, -np.inf, where=forbidden)
    if sampling.repetition_penalty != 1:
        seen = _seen_tokens(sequence)
        row[seen] = after_repetition(row[seen].astype(np.float64), sampling.repetition_penalty)
    if sequence.output_counts and (sampling.frequency_penalty or sampling.presence_penalty):
        ids = np.fromiter(sequence.output_counts.keys(), dtype=np.intp)
        counts = np.fromiter(sequence.output_counts.values(), dtype=np.float64)
        row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return row


def _seen_tokens(sequence: Sequence) -> npt.NDArray[np.int64]:
    """The distinct tokens of the prompt, then those of the answer; some may be in both."""
    prompt = np.frombuffer(sequence.group.distinct_prompt, np.int64)
    return np.concatenate((prompt, np.fromiter(sequence.output_counts, np.int64)))


def after_repetition(
    logits: npt.NDArray[np.float64], penalty: float | npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The repetition penalty applied to the logits of tokens seen in the prompt or the answer.

    `penalty` is a number, or [rows, 1] for rows with different penalties.
    """
    # Lower penalties would make no difference, but quotients could become infinite.
    penalty = np.maximum(penalty, _MIN_REPETITION_PENALTY)
    return np.where(logits > 0, logits / penalty, logits * penalty)


def sample_all(
    drawing: Iterable[tuple[Sequence, Any]],
    draw: Callable[[Sequence, Any], SampledToken] = sample,
) -> tuple[list[tuple[Sequence, SampledToken]], list[tuple[Sequence, BaseException]]]:
    """Samples a token for each sequence; returns them, and the errors of sequences that failed.

    `draw` samples one token; a replacement for `sample` may accept other kinds of rows. Advances
    constraint states. Sequences fail with BadLogits or ConstraintError.
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
