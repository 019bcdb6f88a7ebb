"""Samples from a device row's candidates if they determine the token, else from the whole row.

The token is exactly the one that `sampler.sample` draws from the whole row. The whole row is always
needed for log-probabilities, top_n_sigma, and biases or penalties that may raise logits.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many

import numpy as np

from generator_svc.sampling import sampler
from generator_svc.sampling.candidates import Candidates
from generator_svc.sampling.device_row import DeviceRow, GreedyRow
from generator_svc.sequence import SampledToken, Sequence

LogitsRow = sampler.HostRow | DeviceRow | GreedyRow  # float32 [vocabulary]

_MAX_ROWS = 64  # at once: the arrays of more rows do not fit into the L2 cache


def sample_all(
    drawing: Iterable[tuple[Sequence, LogitsRow]],
) -> tuple[list[tuple[Sequence, SampledToken]], list[tuple[Sequence, BaseException]]]:
    """`sampler.sample_all`, for rows on the host or on the device."""
    drawing = list(drawing)
    on_device = [(sequence, row) for sequence, row in drawing if isinstance(row, DeviceRow)]
    found = dict(zip((s for s, _ in on_device), certain_tokens(on_device), strict=True))

    def sample(sequence: Sequence, logits: LogitsRow) -> SampledToken:
        if isinstance(logits, GreedyRow):
            if logits.is_certain:
                return SampledToken(logits.token_id)
            logits = logits.fetch()
        if isinstance(logits, DeviceRow):
            token_id = found[sequence]
            if token_id is not None:
                return SampledToken(token_id)
            logits = logits.whole
        return sampler.sample(sequence, logits)

    return sampler.sample_all(drawing, sample)


def certain_tokens(drawing: Many[tuple[Sequence, DeviceRow]]) -> list[int | None]:
    """For each row the token that `sampler.sample` draws from it; None if it needs the whole row.

    All rows have the same vocabulary.
    """
    tokens: list[int | None] = [None] * len(drawing)
    places = [place for place, (sequence, _) in enumerate(drawing) if _may_be_certain(sequence)]
    with np.errstate(all="ignore"):
        for first in range(0, len(places), _MAX_ROWS):
            part = places[first : first + _MAX_ROWS]
            found, is_certain = Candidates([drawing[place] for place in part]).draw()
            for place, token_id, certain in zip(part, found.tolist(), is_certain, strict=True):
                if certain:
                    tokens[place] = token_id
    return tokens


def _may_be_certain(sequence: Sequence) -> bool:
    """Whether no log-probabilities are requested, and no bias or penalty may raise logits."""
    sampling = sequence.request.sampling
    return sequence.request.top_logprobs is None and not (
        sampling.logit_bias
        or sampling.repetition_penalty < 1
        or sampling.frequency_penalty < 0
        or sampling.presence_penalty < 0
    )
