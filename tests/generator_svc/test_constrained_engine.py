"""Constraints in the engine: with n, seeds, large batches, stops, penalties, reuse, failures."""

import itertools
import json
import random
from array import array

import jsonschema
import numpy as np
import pytest

from generator_svc.sampling.sampler import sample
from generator_svc.sequence import ConstraintError, FinishReason, SamplingParams
from tests.fakes import ScriptedRunner
from tests.generator_svc.engine_harness import Harness
from tests.generator_svc.sampling_oracle import sequence_of
from tests.generator_svc.schema_draw import draw_schema
from tests.generator_svc.text_tokens import compiled, text_tokens

PEOPLE = json.dumps(
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 9},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        "minItems": 1,
        "maxItems": 3,
    }
)


def _harness(slots=4, logits=None, **fields):
    tokens = text_tokens()
    runner = ScriptedRunner(slots, 512, logits or tokens.random_logits)
    return Harness(slots=slots, slot_length=512, runner=runner, **fields)


def _submit(harness, prompt, kind="json_schema", text=PEOPLE, count=300, **fields):
    fields.setdefault("stop_token_ids", frozenset({text_tokens().eos}))
    fields.setdefault("sampling", SamplingParams(temperature=1.0, seed=7))
    constraint = compiled(kind, text) if kind else None
    return harness.submit(prompt, count, constraint=constraint, **fields)


def _answers(harness, group):
    """Texts by index, and finish reasons by index."""
    tokens = text_tokens()
    texts = {i: tokens.decode(ids) for i, ids in harness.tokens[group].items()}
    return texts, {s.index: s.finish_reason for s in group.sequences}


def _fits(text, schema=PEOPLE):
    return jsonschema.Draft202012Validator(json.loads(schema)).is_valid(json.loads(text))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_every_finished_answer_fits_its_schema(temperature):
    """With many schemas at once, some requests with n, some without a constraint."""
    harness = _harness(slots=5)
    groups = {}
    for seed in range(60):
        draw = random.Random(seed)
        schema = json.dumps(draw_schema(draw))
        prompt = [3 + draw.randrange(300) for _ in range(draw.randrange(1, 9))]
        sampling = SamplingParams(temperature=temperature, seed=seed)
        fields = {"sampling": sampling, "count": 200, "n": draw.choice([1, 1, 3])}
        try:
            groups[_submit(harness, prompt, text=schema, **fields)] = schema
        except ConstraintError:
            _submit(harness, prompt, kind=None, **fields)
        harness.step()
    harness.finish()

    stopped = 0
    for group, schema in groups.items():
        assert group not in harness.errors
        texts, reasons = _answers(harness, group)
        for index, text in texts.items():
            if reasons[index] is FinishReason.STOP_TOKEN:
                stopped += 1
                assert _fits(text, schema), (schema, text)
    assert stopped > 50


@pytest.mark.parametrize("reuse", [False, True])
def test_constrained_tokens_do_not_depend_on_the_batch(reuse):
    """The same seed gives the same tokens alone and in a batch with others, constrained or not."""
    prompt = list(range(30, 60))
    alone = _harness(reuse=reuse)
    wanted = _submit(alone, prompt, n=4)
    alone.finish()
    crowded = _harness(slots=3, reuse=reuse)
    others = []
    for seed in range(8):
        kind, text = [("json_schema", PEOPLE), ("regex", "[a-z ]{4,90}"), (None, "")][seed % 3]
        sampling = SamplingParams(temperature=1.0, seed=seed)
        prefix = prompt[: 4 * seed]
        others.append(_submit(crowded, [*prefix, 5], kind, text, sampling=sampling, count=60))
        crowded.step()
    got = _submit(crowded, prompt, n=4)
    crowded.finish()

    assert alone.tokens[wanted] == crowded.tokens[got]
    assert len({tuple(ids) for ids in crowded.tokens[got].values()}) > 1
    assert not crowded.errors
    assert all(_fits(text) for text in _answers(crowded, got)[0].values())


def test_greedy_takes_the_most_likely_allowed_token():
    """Compared step by step with a mask made by hand."""
    tokens = text_tokens()
    harness = _harness()
    group = _submit(harness, [9, 9], "regex", "[ab]{12}", sampling=SamplingParams(temperature=0))
    harness.finish()
    written, expected, context = "", [], [9, 9]
    while len(written) < 12:
        pieces = {t: tokens.decode([t]) for t in range(3, tokens.known)}
        fitting = [t for t, p in pieces.items() if p and not p.strip("ab")]
        fitting = [t for t in fitting if len(written) + len(pieces[t]) <= 12]
        logits = tokens.random_logits(context)
        expected.append(max(fitting, key=lambda token: logits[token]))
        context.append(expected[-1])
        written += pieces[expected[-1]]

    assert [*expected, tokens.eos] == harness.tokens[group][0]


@pytest.mark.parametrize("regex", ["[ab]{9}", "[^ab]{9}"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 7, "min_p": 0.01}],
)
def test_mask_equals_logits_of_minus_infinity(regex, settings):
    """A mask, whether it allows few tokens or many, works like logits of minus infinity."""
    tokens = text_tokens()
    allowed = compiled("regex", regex).new_state().allowed()
    logits = tokens.random_logits([1, 2, 3])
    masked = np.where(allowed, logits, np.float32(-np.inf))
    drawn = set()
    for seed in range(150):
        sampling = SamplingParams(temperature=2.0, seed=seed, **settings)
        one = sequence_of(sampling=sampling, constraint=compiled("regex", regex))
        other = sequence_of(sampling=sampling)
        drawn.add(sample(one, logits).token_id)

        assert sample(one, logits) == sample(other, masked)
    assert len(drawn) > 1


def test_penalties_and_bias_work_within_the_constraint():
    """A bias chooses among tokens that fit and cannot force one that does not."""
    tokens = text_tokens()
    [a, b, c] = (tokens.encode(letter)[0] for letter in "abc")
    harness = _harness()
    bias = {a: 50.0, c: 100.0}
    biased = SamplingParams(temperature=0, logit_bias=bias)
    varied = SamplingParams(
        temperature=0, logit_bias=bias, frequency_penalty=2, repetition_penalty=10
    )
    groups = [_submit(harness, [9], "regex", "[ab]{9}", sampling=one) for one in (biased, varied)]
    harness.finish()

    assert [a] * 9 == harness.tokens[groups[0]][0][:-1]
    assert {a, b} <= set(harness.tokens[groups[1]][0])
    assert not {c} & set(harness.tokens[groups[1]][0])


def test_logprobs_are_those_of_the_model():
    """They are taken before the mask, so the top token may be one that does not fit."""
    tokens = text_tokens()
    harness = _harness()
    group = _submit(harness, [9], "regex", "[ab]{5}", top_logprobs=3)
    harness.finish()

    context = [9]
    for update in harness.updates:
        logits = tokens.random_logits(context).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        token = update.token
        assert token.logprobs.logprob == pytest.approx(logprobs[token.token_id])
        assert np.argsort(-logprobs)[:3].tolist() == list(token.logprobs.top_token_ids)
        context.append(token.token_id)
    assert group.is_finished


@pytest.mark.parametrize("ignores_end", [False, True])
@pytest.mark.parametrize("least", [0, 30])
def test_complete_text_ends_despite_ignore_eos_and_min_tokens(ignores_end, least):
    """Neither ignore_eos nor min_tokens can extend a text that is complete."""
    tokens = text_tokens()
    stops = frozenset() if ignores_end else frozenset({tokens.eos})
    harness = _harness()
    fields = {"stop_token_ids": stops, "min_new_tokens": least}
    exact = _submit(harness, [9], "regex", "[ab]{6}", **fields)
    open_ended = _submit(harness, [9], "regex", "[ab]{6,}", count=40, **fields)
    harness.finish()
    texts, reasons = _answers(harness, exact)

    assert 6 == len(texts[0])
    assert FinishReason.STOP_TOKEN is reasons[0]
    assert tokens.eos == harness.tokens[exact][0][-1]
    assert len(harness.tokens[open_ended][0]) > (39 if ignores_end else least)


def _allowing(text, **fields):
    """Sampling of the tokens of this text only."""
    ids = array("q", text_tokens().encode(text))
    return SamplingParams(**{"temperature": 1.0, "seed": 7} | fields, allowed_token_ids=ids)


@pytest.mark.parametrize("least", [0, 30])
@pytest.mark.parametrize(("regex", "length"), [("[abc]{6}", 6), ("(b|ba|c){3}c?", 3)])
def test_complete_text_ends_although_its_end_is_not_allowed(regex, length, least):
    """Only b and c may be generated; when nothing else is left, the text ends all the same."""
    harness = _harness()
    sampling = _allowing("b")
    group = _submit(harness, [9], "regex", regex, sampling=sampling, min_new_tokens=least)
    harness.finish()
    texts, reasons = _answers(harness, group)

    assert "b" * length == texts[0]
    assert FinishReason.STOP_TOKEN is reasons[0]


def test_bad_words_work_within_a_constraint():
    """They exclude what would fit, and the end of a text only while something else fits."""
    tokens = text_tokens()
    bad_words = tuple((*tokens.encode(pair),) for pair in ("bb", "cc"))
    bad_words += tuple((*tokens.encode(one), *tokens.encode(one)) for one in "bc")
    harness = _harness()
    inner = _submit(harness, [9], "regex", "[bc]{8}", bad_words=bad_words)
    ends = _submit(harness, [9], "regex", "[bc]{8}", bad_words=((tokens.eos,),))
    none = _submit(harness, [9], "regex", "[bc]{3}a", bad_words=((*tokens.encode("a"),),))
    harness.finish()

    assert _answers(harness, inner)[0][0] in ("bcbcbcbc", "cbcbcbcb")
    assert 8 == len(_answers(harness, ends)[0][0])
    assert {"bad_words"} == {error.param for error in harness.errors.values()}
    assert [none] == [*harness.errors]


def test_text_may_go_on_as_long_as_an_allowed_token_fits():
    """Of a text that is complete but may go on, the end is not drawn unless it is allowed."""
    harness = _harness()
    group = _submit(harness, [9], "regex", "[abc]+", sampling=_allowing("bc"), count=40)
    harness.finish()
    texts, reasons = _answers(harness, group)

    assert 40 == len(texts[0])
    assert {*"bc"} == {*texts[0]}
    assert FinishReason.LENGTH is reasons[0]


def test_allowed_tokens_that_contradict_the_constraint_fail_their_own_request_only():
    """With an error that names the field, once no token is left."""
    harness = _harness()
    bad = _submit(harness, [9], "regex", "[bc]{3}ab*", sampling=_allowing("b"), n=2)
    good = _submit(harness, [9], "regex", "[abc]{6}", sampling=_allowing("b"))
    harness.finish()
    error = harness.errors[bad]

    assert {bad} == harness.errors.keys()
    assert "sampling.allowed_token_ids" == error.param
    assert "no token to generate after 3 tokens" in error.message
    assert good.is_finished


def test_a_callers_stop_token_ends_an_unfinished_text():
    """Because the caller asked for it."""
    tokens = text_tokens()
    [b] = tokens.encode("b")
    harness = _harness()
    group = _submit(harness, [9], "regex", "(a|b){200}", stop_token_ids=frozenset({tokens.eos, b}))
    harness.finish()

    assert b == harness.tokens[group][0][-1]
    assert FinishReason.STOP_TOKEN is group.sequences[0].finish_reason


def test_max_tokens_applies_to_constrained_text():
    """max_tokens applies as without a constraint."""
    harness = _harness()
    group = _submit(harness, [9], "regex", "a{400}", count=5)
    harness.finish()

    assert FinishReason.LENGTH is group.sequences[0].finish_reason
    assert set(_answers(harness, group)[0][0]) == {"a"}


@pytest.mark.parametrize("index", [0, 1])
def test_stopping_one_choice_leaves_the_others_unchanged(index):
    """Each choice has its own constraint state."""
    whole = _harness()
    wanted = _submit(whole, [5, 6], n=3)
    whole.finish()
    harness = _harness()
    group = _submit(harness, [5, 6], n=3)
    for _ in range(4):
        harness.step()
    harness.engine.stop(group, index)
    harness.finish()

    for other in {0, 1, 2} - {index}:
        assert whole.tokens[wanted][other] == harness.tokens[group][other]
    assert len(harness.tokens[group][index]) < len(whole.tokens[wanted][index])


def test_cancelled_requests_free_their_constraint_state():
    """No constraint state outlives its sequence."""
    harness = _harness()
    groups = [_submit(harness, [value], n=3) for value in range(5, 9)]
    for _ in range(5):
        harness.step()
    assert any(s.constraint_state for group in groups for s in group.sequences)
    for group in groups:
        harness.engine.cancel(group)
    harness.finish()

    assert not any(s.constraint_state for group in groups for s in group.sequences)


def test_nan_fails_its_own_request_only():
    """A constraint does not hide bad logits."""
    tokens = text_tokens()

    def logits(context):
        row = tokens.random_logits(context)
        return row * np.nan if context[0] == 13 and len(context) > 4 else row

    harness = _harness(logits=logits)
    bad, good = _submit(harness, [13, 14], n=2), _submit(harness, [15, 14])
    harness.finish()

    assert [bad] == list(harness.errors)
    assert _fits(_answers(harness, good)[0][0])


def test_no_possible_token_fails_its_own_request_only():
    """Here the model gives all tokens that fit a probability of zero."""
    tokens = text_tokens()
    fitting = compiled("regex", "[ab]*").new_state().allowed()

    def logits(context):
        row = tokens.random_logits(context)
        row[fitting & (context[0] == 13)] = -np.inf
        return row

    harness = _harness(logits=logits)
    bad, good = _submit(harness, [13], "regex", "[ab]*"), _submit(harness, [15])
    harness.finish()

    assert [bad] == list(harness.errors)
    assert good.is_finished


def test_a_constraint_that_grows_too_complex_fails_its_own_request_only():
    """With its own error; other requests get the tokens that they get without it."""
    tokens = text_tokens()
    [a] = tokens.encode("a")
    ambiguous = 'start: e\ne: e e | "a" | e e e | '
    harness, quiet = _harness(), _harness()
    sampling = SamplingParams(temperature=0, logit_bias={a: 90.0})
    bad = _submit(harness, [9], "lark", ambiguous, n=2, count=400, sampling=sampling)
    good = _submit(harness, [5, 6], count=400)
    wanted = _submit(quiet, [5, 6], count=400)
    harness.finish()
    quiet.finish()

    assert "json_schema_too_complex" == harness.errors[bad].code
    assert {bad} == harness.errors.keys()
    assert quiet.tokens[wanted] == harness.tokens[good]


def test_unconstrained_requests_have_no_state_or_mask():
    """Without a constraint there is no state and no mask."""
    harness = _harness()
    group = _submit(harness, [5], kind=None, count=5)
    harness.finish()

    assert [None] == [s.constraint_state for s in group.sequences]
    assert list(itertools.chain(*harness.tokens[group].values()))
