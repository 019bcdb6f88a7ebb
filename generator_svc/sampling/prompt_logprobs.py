"""Log-probabilities of prompt tokens, each from the logits of the token before it."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from generator_svc.sampling.draw import BadLogits, checked
from generator_svc.sampling.sampler import logprobs
from generator_svc.sequence import Sequence


def score(sequence: Sequence, all_logits: npt.NDArray[np.float32]) -> BadLogits | None:
    """Adds the log-probabilities that a chunk's logits yield, with ranks, to the group's
    `prompt_logprobs`.

    `all_logits`, float32 [tokens, vocabulary], are those of every token of the chunk; each predicts
    the next prompt token. Returns the error if the logits are bad. To be called before the chunk
    counts as computed.
    """
    request, group, start = sequence.request, sequence.group, sequence.computed
    assert request.prompt_logprobs is not None
    if start == 0:  # may start again after another sequence of the group was stopped
        group.prompt_logprobs.clear()
    # The last token of the prompt predicts none of it. Not a slice of all that follows: it would be
    # copied for every chunk.
    following = request.prompt[start + 1 : start + 1 + len(all_logits)]
    try:
        for token_id, row in zip(following, all_logits, strict=False):
            checked(float(row.max()))
            found = logprobs(row, token_id, request.prompt_logprobs)
            rank = int(np.count_nonzero(row >= row[token_id]))
            group.prompt_logprobs.append(replace(found, rank=rank))
    except BadLogits as error:
        return error
    return None
