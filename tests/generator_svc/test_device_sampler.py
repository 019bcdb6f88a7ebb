"""Sampling from candidates, compared with whole rows, and the graph that selects candidates."""

import dataclasses
from array import array

import numpy as np
import pytest

import generator_svc.run.runner as runner_module
from generator_svc.config import GeneratorSettings
from generator_svc.device import Device
from generator_svc.metering import Meter
from generator_svc.run.logits_buffers import DeviceLogits
from generator_svc.run.runner import OrtRunner
from generator_svc.sampling.device_row import (
    BLOCK,
    CANDIDATES,
    RELATIVE_ERROR,
    GreedyRow,
)
from generator_svc.sampling.device_sampler import certain_tokens, sample_all
from generator_svc.sampling.draw import BadLogits
from generator_svc.sampling.sampler import sample as sample_whole
from generator_svc.sequence import ConstraintError, SamplingParams
from generator_svc.startup import warm_up
from tests.generator_svc.engine_harness import Harness
from tests.generator_svc.sampling_oracle import device_row, sequence_of
from tests.tiny_models import tiny_model_directory
from trivium.model_directory import load_model_directory

SIZES = [256, 257, 300, 1000, 5000]
SHAPES = ["model", "zipf", "gauss"]


def certain_token(sequence, row):
    """The token of a single row, or None if its candidates do not determine it."""
    return certain_tokens([(sequence, row)])[0]


def sample(sequence, row):
    """The same, from the whole row if necessary; raises the error if it fails."""
    tokens, failures = sample_all([(sequence, row)])
    for _, error in failures:
        raise error
    return tokens[0][1]


def _row(random, size, shape):
    """float32 [size]: a few likely tokens, a long tail, or numbers with ties and gaps."""
    if shape == "model":
        likely = np.where(random.random(size) < 8 / size, 14 * random.random(size), 0)
        return (1.5 * random.standard_normal(size) + likely).astype(np.float32)
    if shape == "zipf":
        return (-random.uniform(1.3, 2.6) * np.log1p(random.permutation(size))).astype(np.float32)
    row = random.standard_normal(size) * random.choice([0.0, 1e-20, 0.01, 0.5, 3, 30])
    row = np.round(row, random.choice([0, 1, 7, 30]))
    row[random.random(size) < random.choice([0, 0, 0.3, 0.97])] = -np.inf
    return row.astype(np.float32)


def _sampling(random, size):
    """Any sampling parameters, including those for which candidates are not enough."""
    allowed = random.permutation(size)[: random.choice([0, 0, 0, 1, 20, size // 2])]
    return SamplingParams(
        temperature=float(random.choice([0, 0.3, 0.7, 1, 1, 1, 1.5, 1e-300])),
        top_k=int(random.choice([-1, 0, 0, 0, 1, 2, 20, 200, 255, 256, 1000])),
        top_p=float(random.choice([0, 0.1, 0.5, 0.8, 0.95, 0.9999, 1, 1, 1, 1])),
        min_p=float(random.choice([0, 0, 0, 0.05, 0.5, 1e-6, 1])),
        repetition_penalty=float(random.choice([1, 1, 1, 1.05, 2, 0.8])),
        frequency_penalty=float(random.choice([0, 0, 0, 0.5, -1])),
        presence_penalty=float(random.choice([0, 0, 0, 0.5, -1])),
        top_n_sigma=float(random.choice([0, 0, 0, -1, 0.5, 3])),
        allowed_token_ids=array("q", allowed.tolist()),
        seed=int(random.integers(2**40)),
    )


def _bad_words(random, likely, output):
    """Likely tokens, alone or after the last ones of the output or others."""
    words = []
    for token_id in likely[: random.integers(1, 30)]:
        before = output[len(output) - random.integers(3) :]
        words.append(tuple(map(int, (*before, *([7] if random.random() < 0.2 else []), token_id))))
    return tuple(words)


def _sequence(random, row, sampling):
    """A sequence with likely and unlikely tokens, which sometimes may not end yet."""
    likely = np.argsort(-row, kind="stable")
    output = [*random.integers(row.size, size=2), *likely[: random.integers(4)]]
    return sequence_of(
        random.integers(row.size, size=3).tolist(),
        [int(token_id) for token_id in output],
        sampling=sampling,
        min_new_tokens=int(random.choice([0, 0, 50])),
        stop_token_ids=frozenset({int(likely[0]), 5}),
        bad_words=_bad_words(random, likely, output) if random.random() < 0.3 else (),
    )


def _perturbed(random, row):
    """The same row with sums as inexact as they may be, and equal logits in any order."""
    error = RELATIVE_ERROR * random.uniform(-0.9, 0.9, row.rest.size)
    order = random.permutation(CANDIDATES)
    order = order[np.argsort(-row.values[order], kind="stable")]
    return dataclasses.replace(
        row, ids=row.ids[order], rest=(row.rest * (1 + error)).astype(np.float32)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_certain_tokens_are_those_the_sampler_draws(size, shape):
    """With any parameters, ties, impossible tokens, penalties, masks, and inexact sums."""
    random = np.random.default_rng([size, SHAPES.index(shape)])
    certain = 0
    for _ in range(20):
        row = _row(random, size, shape)
        for _ in range(12):
            sampling = _sampling(random, size)
            sequence = _sequence(random, row, sampling)
            on_device = _perturbed(random, device_row(row, sampling.temperature))
            token_id = certain_token(sequence, on_device)
            if token_id is not None:
                certain += 1
                assert sample_whole(sequence, row).token_id == token_id

    assert certain > 0


@pytest.mark.parametrize(
    ("least", "fields"),
    [
        (1.0, {"temperature": 0}),
        (1.0, {"temperature": 0, "top_n_sigma": 1.0}),
        (1.0, {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.5}),
        (1.0, {"top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05}),
        (0.9, {"top_p": 0.9, "temperature": 0.7}),
        (0.9, {"min_p": 0.05}),
        (0.9, {"temperature": 0.6}),
        (0.9, {"top_p": 0.6, "temperature": 1.2}),
        (0.6, {"temperature": 1.2}),
        (0.8, {}),
    ],
)
def test_usual_settings_seldom_need_the_whole_row(least, fields):
    """For realistic logits, at least a share of `least` of all draws is certain, and right."""
    random = np.random.default_rng(1)
    draws = 100
    certain = 0
    for seed in range(draws):
        row = _row(random, 10_000, "zipf")
        sampling = SamplingParams(seed=seed, **fields)
        sequence = sequence_of((1, 2), (3, 4), sampling=sampling)
        token_id = certain_token(sequence, device_row(row, sampling.temperature))
        if token_id is not None:
            certain += 1
            assert sample_whole(sequence, row).token_id == token_id

    assert certain >= least * draws


def _edges(row, temperature):
    """Draws around the ends of the likely tokens' intervals, in the order of ids."""
    weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
    ends = np.cumsum(weights) / weights.sum()
    likely = np.argsort(-row, kind="stable")[:40]
    away = [0, 1e-15, 1e-12, 1e-7, 1e-5, 1e-4, 1e-3]
    draws = [end + sign * by for end in ends[likely] for by in away for sign in (1, -1)]
    return [draw for draw in draws if 0 <= draw < 1]


@pytest.mark.parametrize("error", [-1, 1])
@pytest.mark.parametrize("shape", [*SHAPES, "ties"])
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.7}, {"top_p": 0.7}]
)
def test_draws_at_the_edges_of_a_token(shape, error, fields, monkeypatch):
    """With all sums too large or too small, and interval ends among equal logits."""
    random = np.random.default_rng(3)
    row = _row(random, 900, "model" if shape == "ties" else shape)
    if shape == "ties":
        row = np.maximum(np.round(row), 0)
    given = device_row(row, fields.get("temperature", 1.0))
    rest = (given.rest * (1 + 0.9 * error * RELATIVE_ERROR)).astype(np.float32)
    given = dataclasses.replace(given, rest=rest)
    sequence = sequence_of(sampling=SamplingParams(**fields))
    certain = 0
    for draw in _edges(row, given.temperature):
        for name in ("candidates", "sampler"):
            monkeypatch.setattr(f"generator_svc.sampling.{name}.uniform", lambda seed, at: draw)  # noqa: B023 - called before the loop continues
        token_id = certain_token(sequence, given)
        if token_id is not None:
            certain += 1
            assert sample_whole(sequence, row).token_id == token_id

    assert certain > 0 or shape == "gauss"


def test_candidate_as_low_as_the_rest_is_not_certain():
    """A penalty lowers the only larger logit to where a token with a lower id may be first."""
    row = np.zeros(600, np.float32)
    row[300] = 0.5
    for penalty, expected in ((0.25, 300), (0.5, None), (0.75, None)):
        sampling = SamplingParams(temperature=0, presence_penalty=penalty)
        assert expected == certain_token(
            sequence_of((1,), (300,), sampling=sampling), device_row(row)
        )


def test_top_k_of_all_allowed_tokens_is_no_limit():
    """The sampler then draws in another order, so that no token is certain."""
    row = np.linspace(0, 9, 1000).astype(np.float32)
    constraint = FixedMask(1000, [990, 995, 999])
    drawn = set()
    for seed in range(40):
        sampling = SamplingParams(seed=seed, top_k=3)
        drawn.add(
            certain_token(sequence_of(sampling=sampling, constraint=constraint), device_row(row))
        )

    assert {None} == drawn


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": SamplingParams(temperature=0, logit_bias={7: 3.0})},
        {"sampling": SamplingParams(temperature=0, repetition_penalty=0.9)},
        {"sampling": SamplingParams(temperature=0, frequency_penalty=-0.1)},
        {"sampling": SamplingParams(temperature=0, presence_penalty=-0.1)},
        {"sampling": SamplingParams(temperature=0), "top_logprobs": 2},
        {"sampling": SamplingParams(temperature=1.3)},  # the sums are for temperature 1
        {"sampling": SamplingParams(top_k=256)},
        {"sampling": SamplingParams(top_n_sigma=1.0)},
    ],
)
def test_settings_that_candidates_cannot_cover_need_the_whole_row(fields):
    """Biases, penalties that raise logits, top_n_sigma, logprobs, and too few candidates."""
    row = _row(np.random.default_rng(4), 1000, "zipf")
    sequence = sequence_of((1, 2), (3,), **fields)

    assert certain_token(sequence, device_row(row)) is None
    assert sample_whole(sequence, row) == sample(sequence, device_row(row))


@pytest.mark.parametrize("seed", range(4))
def test_token_does_not_depend_on_the_batch(seed):
    """The same in a mixed batch larger than one slice, one by one, and by the sampler; a row with
    NaN and a constraint that fails cost no other request its token."""
    random = np.random.default_rng(seed)
    drawing, whole = [], []
    for number in range(150):
        row = _row(random, 1000, SHAPES[number % 3])
        sampling = _sampling(random, row.size)
        sequence = _sequence(random, row, sampling)
        if number % 50 == 7:
            row = np.where(np.arange(1000) == 3, np.float32(np.nan), row)
        elif number % 50 == 9:
            sequence = sequence_of(sampling=sampling, constraint=Broken())
        drawing.append((sequence, device_row(row, sampling.temperature)))
        whole.append((sequence, row))
    tokens, failures = sample_all(drawing)
    expected, expected_failures = sample_all(whole)

    assert [certain_token(*pair) for pair in drawing] == certain_tokens(drawing)
    assert expected == tokens
    assert [s for s, _ in expected_failures] == [s for s, _ in failures]
    assert [type(error) for _, error in expected_failures] == [type(error) for _, error in failures]
    assert {BadLogits, ConstraintError} == {type(error) for _, error in failures}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.nan])
@pytest.mark.parametrize("place", [0, 300, 999])
def test_nan_and_infinite_logits_are_refused(bad, place):
    """Wherever they show on the device, with the sampler's error."""
    good = _row(np.random.default_rng(5), 1000, "zipf")
    row, values = good.copy(), device_row(good).values.copy()
    row[place] = bad
    values[100 if np.isnan(bad) else 0] = bad
    among = dataclasses.replace(device_row(good), values=values, fetch=lambda: row)
    for on_device in (device_row(row), among):
        with pytest.raises(BadLogits):
            sample(sequence_of(sampling=SamplingParams(temperature=0)), on_device)


class FixedMask:
    """A constraint that always allows the same tokens."""

    end_token_ids = frozenset()

    def __init__(self, size, allowed):
        self.mask = np.zeros(size, np.bool_)
        self.mask[allowed] = True

    def new_state(self):
        return self

    def allowed(self):
        return self.mask


class Broken(FixedMask):
    """A constraint that fails to compute its mask."""

    def __init__(self):
        super().__init__(1000, [3])

    def allowed(self):
        raise ConstraintError("internal_error", "out of states")


@pytest.mark.parametrize("share", [0.02, 0.2, 0.9])
def test_a_constraint_masks_candidates(share):
    """Whether it allows few tokens, which the sampler handles separately, or many."""
    random = np.random.default_rng(6)
    certain = 0
    for seed in range(150):
        row = _row(random, 2000, "zipf")
        constraint = FixedMask(row.size, random.random(row.size) < share)
        constraint.mask[random.integers(row.size)] = True
        fields = [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 50}][seed % 5]
        sampling = SamplingParams(seed=seed, **fields)
        sequence = sequence_of(sampling=sampling, constraint=constraint)
        token_id = certain_token(sequence, device_row(row))
        if token_id is not None:
            certain += 1
            assert sample_whole(sequence, row).token_id == token_id

    assert certain > 30


def _on_cpu(vocabulary):
    """Logits as on a CUDA device, in main memory instead."""
    return DeviceLogits(Device("cpu"), vocabulary)


@pytest.mark.parametrize("size", [256, 257, 511, 640, 5000])
def test_graph_selects_the_same_candidates_as_numpy(size):
    """Values, ids and sums of the rest, also for equal or impossible logits."""
    random = np.random.default_rng(size)
    rows = np.stack([_row(random, size, shape) for shape in (*SHAPES, "gauss")])
    memory = _on_cpu(size)
    buffer = memory.allocate(len(rows) + 1)
    buffer.update_inplace(np.concatenate([rows, rows[:1]])[:, None])

    temperatures = [1.0, 0.3, 1.7, 1e-300]
    for row, temperature, given in zip(
        rows, temperatures, memory.read(buffer, temperatures), strict=True
    ):
        expected = device_row(row, temperature)
        assert temperature == given.temperature
        assert expected.ids.tolist() == given.ids.tolist()
        assert expected.values.tolist() == given.values.tolist()
        assert -(-size // BLOCK) == given.rest.size
        assert np.allclose(expected.rest, given.rest, rtol=RELATIVE_ERROR / 4, atol=1e-36)
        assert row.tolist() == given.whole.tolist()


def test_bad_logit_leaves_no_token_certain():
    """A single bad logit, among the candidates or not, leaves no token certain."""
    rows = np.stack([_row(np.random.default_rng(8), 1000, "zipf")] * 3)
    rows[0, 400], rows[1, 3], rows[2, :] = np.nan, np.inf, -np.inf
    memory = _on_cpu(1000)
    buffer = memory.allocate(3)
    buffer.update_inplace(rows[:, None])
    sequence = sequence_of(sampling=SamplingParams(temperature=0))

    assert [None] * 3 == [certain_token(sequence, row) for row in memory.read(buffer, [0] * 3)]


@pytest.mark.parametrize("size", [256, 257, 5000])
def test_greedy_needs_only_the_largest_logit(size):
    """Certain unless another is as large, or any is NaN or inf; then the whole row is fetched."""
    random = np.random.default_rng(size)
    rows = np.stack([random.permutation(size).astype(np.float32) for _ in range(6)])
    rows[1, rows[1].argmin()] = rows[1].max()
    rows[2, 7], rows[3, 9], rows[4, :], rows[5, 1:] = np.nan, np.inf, np.nan, -np.inf
    memory = _on_cpu(size)
    buffer = memory.allocate(6)
    buffer.update_inplace(rows[:, None])
    given = memory.read(buffer, [None] * 6)

    assert [True, False, False, False, False, True] == [row.is_certain for row in given]
    assert [int(rows[0].argmax()), 0] == [given[0].token_id, given[5].token_id]
    greedy = sequence_of(sampling=SamplingParams(temperature=0))
    assert int(rows[1].argmax()) == sample(greedy, given[1]).token_id
    for row in given[2:5]:
        with pytest.raises(BadLogits):
            sample(greedy, row)


def test_only_rows_that_need_candidates_get_them(monkeypatch):
    """64 at a time, wherever they are in the batch; the others only get their largest logit."""
    rows = np.random.default_rng(3).permutation(200 * 300).astype(np.float32).reshape(200, 300)
    memory = _on_cpu(300)
    buffer = memory.allocate(200)
    buffer.update_inplace(rows[:, None])
    temperatures = [1 + row / 200 if row % 2 or row == 70 else None for row in range(200)]
    sliced, read = [], memory._read_candidates
    monkeypatch.setattr(
        memory, "_read_candidates", lambda *given: sliced.append(len(given[-1])) or read(*given)
    )
    given = memory.read(buffer, temperatures)

    assert [64, 37] == sliced
    for row, part, temperature in zip(rows, given, temperatures, strict=True):
        assert row.argmax() == (part.token_id if isinstance(part, GreedyRow) else part.ids[0])
        assert temperature == getattr(part, "temperature", None)
        assert row.tolist() == part.fetch().tolist()


def test_device_selection_is_verified(monkeypatch):
    """A device that selects correctly passes the check, another one fails it."""
    memory = _on_cpu(700)
    memory.check()
    monkeypatch.setattr(Device, "copy_to_host", lambda self, target, source, size: None)
    with pytest.raises(ArithmeticError):
        memory.check()


@pytest.fixture(scope="module")
def model():
    return load_model_directory(tiny_model_directory())


def _runner(model, patch=None):
    """A runner, with logits as on a CUDA device if `patch` is given."""
    if patch:
        patch.setattr(runner_module, "HostLogits", lambda size, dtype: _on_cpu(size))
    return OrtRunner(model, "cpu", 4, 96, threads=1)


def test_engine_generates_the_same_tokens_from_device_logits(model, monkeypatch):
    """Greedy and sampled, filters, penalties, several choices, logprobs; after warm-up."""
    allowed = array("q", range(3, 400, 7))
    bad_words = tuple((token_id,) for token_id in range(0, 500, 3))
    requests = [
        {"sampling": SamplingParams(temperature=0)},
        {"sampling": SamplingParams(temperature=0), "top_logprobs": 2},
        {"sampling": SamplingParams(seed=3), "n": 3},
        {"sampling": SamplingParams(seed=4, temperature=0.5, top_p=0.9)},
        {"sampling": SamplingParams(seed=5, top_k=20, repetition_penalty=1.1)},
        {"sampling": SamplingParams(seed=6, frequency_penalty=0.3), "top_logprobs": 2},
        {"sampling": SamplingParams(temperature=0, allowed_token_ids=allowed)},
        {"sampling": SamplingParams(seed=7, top_p=0.9, allowed_token_ids=allowed), "n": 2},
        {"sampling": SamplingParams(temperature=0), "bad_words": bad_words},
        {"sampling": SamplingParams(seed=8, top_k=9), "bad_words": bad_words, "n": 2},
    ]
    answers = []
    for runner in (_runner(model), _runner(model, monkeypatch)):
        warm_up(GeneratorSettings(model_directory=model.path), runner, Meter())
        harness = Harness(slots=4, slot_length=96, runner=runner)
        groups = [
            harness.submit([9 + i, *range(20, 40)], 20, stop_token_ids=frozenset(), **fields)
            for i, fields in enumerate(requests)
        ]
        harness.finish()
        drawn = [{*harness.tokens[group][0]} for group in groups]
        assert drawn[6] | drawn[7] <= {*allowed}
        assert (drawn[8] | drawn[9]).isdisjoint(range(0, 500, 3))
        answers.append(
            [
                [update.token for update in harness.updates if update.group is group]
                for group in groups
            ]
        )

    assert answers[0] == answers[1]


def test_candidates_are_enough_for_a_greedy_batch(model, monkeypatch):
    """No row is fetched, and prompt chunks that need no logits have none."""
    fetched = []
    monkeypatch.setattr(Device, "copy_to_host", lambda *copy: fetched.append(copy))
    harness = Harness(slots=4, slot_length=96, runner=_runner(model, monkeypatch))
    for i in range(4):
        harness.submit([9 + i, *range(20, 50)], 12, stop_token_ids=frozenset())
    harness.finish()

    assert [] == fetched
    assert CANDIDATES <= model.vocab_size
