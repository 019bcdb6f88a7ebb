"""Log-probabilities of a prompt's own tokens, each by the logits of the token before it."""

from generator_svc.run.logits_buffers import Logits
from generator_svc.sampling.draw import BadLogits, checked
from generator_svc.sampling.sampler import logprobs
from generator_svc.sequence import Sequence


def score(sequence: Sequence, all_logits: Logits) -> BadLogits | None:
    """Adds those of the tokens that follow each of a chunk's, whose logits are `all_logits`,
    float32 [tokens, vocabulary], to the group's; returns what is wrong with the logits, if
    anything is.

    To be called before the chunk counts as computed.
    """
    request, group, start = sequence.request, sequence.group, sequence.computed
    assert request.prompt_logprobs is not None
    if start == 0:  # begun once more, after another of the group was stopped
        group.prompt_logprobs.clear()
    following = request.prompt[start + 1 : start + 1 + len(all_logits)]
    try:
        for token_id, row in zip(following, all_logits, strict=False):
            checked(float(row.max()))
            group.prompt_logprobs.append(logprobs(row, token_id, request.prompt_logprobs))
    except BadLogits as error:
        return error
    return None
