"""A naive reference implementation of sampling: plain loops, one full sort, no shortcuts."""

import math

import numpy as np
import pytest

from generator_svc.admission import Admission
from generator_svc.sampling.device_row import BLOCK, CANDIDATES, DeviceRow
from generator_svc.sampling.sampler import sample
from generator_svc.sequence import EngineRequest, SequenceGroup

GRID = 500


def sequence_of(prompt=(0,), output=(), **fields):
    """A sequence that has generated `output` so far."""
    request = EngineRequest(tuple(prompt), 1_000, **fields)
    sequence = SequenceGroup(request, Admission(1, 1).enter(1)).sequences[0]
    for token_id in output:
        sequence.append(token_id)
    return sequence


def adjusted(sequence, logits):
    """Logits after bias, mask, repetition, frequency and presence penalty, in this order; float32
    after each, which matters where a small repetition penalty makes them huge."""
    sampling, request = sequence.request.sampling, sequence.request
    output = sequence.token_ids[sequence.prompt_length :]
    result = []
    for token_id, given in enumerate(logits):
        value = _float32(float(given) + sampling.logit_bias.get(token_id, 0.0))
        if len(output) < request.min_new_tokens and token_id in request.stop_token_ids:
            value = -math.inf
        if sampling.allowed_token_ids and token_id not in sampling.allowed_token_ids:
            value = -math.inf
        after = [*output, token_id]
        if any(after[-len(word) :] == [*word] for word in request.bad_words):
            value = -math.inf
        if token_id in sequence.token_ids:
            penalty = sampling.repetition_penalty
            value = _float32(value / penalty if value > 0 else value * penalty)
        frequency = sampling.frequency_penalty * output.count(token_id)
        result.append(
            _float32(value - frequency - sampling.presence_penalty * (token_id in output))
        )
    return result


@np.errstate(over="ignore")
def _float32(value):
    return float(np.float32(value))


def probabilities(sequence, logits):
    """Token id to probability, for the tokens that can be drawn."""
    sampling = sequence.request.sampling
    row = adjusted(sequence, logits)
    ids = sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))
    best = row[ids[0]]
    if sampling.temperature == 0:
        return {ids[0]: 1.0}
    if sampling.top_n_sigma > 0:
        finite = [value for value in row if value > -math.inf]
        mean = math.fsum(finite) / len(finite)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / len(finite))
        ids = [i for i in ids if row[i] >= best - sampling.top_n_sigma * deviation]
    weight = {}
    for token_id in ids:
        distance = (row[token_id] - best) / sampling.temperature
        weight[token_id] = math.exp(distance) if distance > -745 else 0.0
    if sampling.top_k > 0:
        ids = ids[: sampling.top_k]
    ids = _nucleus(ids, weight, sampling.top_p) if sampling.top_p < 1 else ids
    ids = [token_id for token_id in ids if weight[token_id] >= sampling.min_p]
    total = math.fsum(weight[token_id] for token_id in ids)
    return {token_id: weight[token_id] / total for token_id in ids}


def _nucleus(ids, weight, top_p):
    total = math.fsum(weight[token_id] for token_id in ids)
    kept, reached = [], 0.0
    for token_id in ids:
        kept.append(token_id)
        reached += weight[token_id]
        if reached >= top_p * total:
            break
    return kept


def interval(sequence, logits, token_id):
    """The draws that give a token: most likely tokens first if there is a filter, else by id."""
    sampling = sequence.request.sampling
    shares = probabilities(sequence, logits)
    if sampling.top_k <= 0 and sampling.top_p >= 1 and sampling.min_p == 0:
        shares = dict(sorted(shares.items()))
    ids = list(shares)
    before = math.fsum(shares[other] for other in ids[: ids.index(token_id)])
    return before, before + shares[token_id]


def swept(sequence, logits, grid=GRID):
    """Token id to the number of draws that give it, for draws in the middle of `grid` cells."""
    counts = {}
    with pytest.MonkeyPatch.context() as patch:
        for cell in range(grid):
            draw = (cell + 0.5) / grid
            patch.setattr("generator_svc.sampling.sampler.uniform", lambda seed, position: draw)  # noqa: B023 - called before the loop continues
            token_id = sample(sequence, logits).token_id
            counts[token_id] = counts.get(token_id, 0) + 1
    return counts


def assert_same_distribution(sequence, logits, grid=GRID):
    """A token's draws are one interval, so its count is off by less than one cell."""
    expected, counts = probabilities(sequence, logits), swept(sequence, logits, grid)

    assert counts.keys() <= expected.keys()
    for token_id, probability in expected.items():
        assert abs(counts.get(token_id, 0) - probability * grid) < 1 + 1e-6 * grid


def edges(sequence, logits):
    """The tokens at the smallest and the largest possible draw."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for draw in (0.0, float(np.nextafter(1.0, 0.0))):
            patch.setattr("generator_svc.sampling.sampler.uniform", lambda seed, position: draw)  # noqa: B023 - called before the loop continues
            found.append(sample(sequence, logits).token_id)
    return found


def log_probabilities(logits):
    """Natural logarithms of the softmax; -inf where it is zero."""
    values = [float(value) for value in logits]
    most = max(values)
    total = math.log(math.fsum(math.exp(value - most) for value in values))
    return [value - most - total for value in values]


def device_row(row, temperature=1.0):
    """What the device computes for a row, float32 [vocabulary], in NumPy."""
    size = row.size
    ids = np.lexsort((np.arange(size), -row))[:CANDIDATES]
    values = row[ids]
    with np.errstate(invalid="ignore"):
        distance = (row - values[0]).astype(np.float64)
        mass = np.exp(distance / max(temperature, 1e-30))
        rest = np.zeros(-(-size // BLOCK) * BLOCK)
        rest[:size] = np.where(row > values[-1], 0, mass)
    sums = rest.reshape(-1, BLOCK).sum(axis=1).astype(np.float32)
    return DeviceRow(size, ids, values, sums, temperature, lambda: row)
