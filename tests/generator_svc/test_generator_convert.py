"""Each field of a request: its limits, its error, its default; and the messages of an answer."""

import math
from array import array
from dataclasses import replace

import pytest

from generator_svc.admission import Admission
from generator_svc.convert import Limits, to_engine_request, to_response
from generator_svc.sequence import (
    EngineRequest,
    FinishReason,
    SampledToken,
    SamplingParams,
    SequenceGroup,
    SequenceUpdate,
    TokenLogprobs,
)
from trivium.generator.v1 import generator_pb2 as pb
from trivium.sampling.v1 import sampling_pb2
from trivium.wire.errors import ServiceError

DEFAULTS = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
LIMITS = Limits(
    revision="r1",
    vocabulary_size=64,
    slot_length=32,
    max_n=8,
    eos_token_ids=(1, 2),
    defaults=DEFAULTS,
)


def _start(sampling=None, **fields):
    fields = {"revision": "r1", "prompt_token_ids": [3, 4, 5]} | fields
    return pb.StartGeneration(sampling=sampling_pb2.SamplingParams(**(sampling or {})), **fields)


def _error(start):
    with pytest.raises(ServiceError) as caught:
        to_engine_request(start, LIMITS)
    return caught.value


def test_absent_fields_take_the_models_defaults():
    """The model's sampling parameters and EOS tokens, and one choice up to the context length."""
    request = to_engine_request(_start(), LIMITS)

    assert (3, 4, 5) == request.prompt
    assert (29, 1, 0) == (request.max_new_tokens, request.n, request.min_new_tokens)
    assert {1, 2} == request.stop_token_ids
    assert request.top_logprobs is None
    kept = {name: getattr(DEFAULTS, name) for name in vars(DEFAULTS) if name != "seed"}
    assert kept == {name: getattr(request.sampling, name) for name in kept}


def test_prompt_logprobs_are_refused_without_support_in_the_graph():
    """An older export, or another builder's; with a newer export the field is accepted."""
    asked = _start(prompt_logprobs=0)
    error = _error(asked)

    assert ("unsupported_parameter", "prompt_logprobs") == (error.code, error.param)
    assert "export it again" in error.message
    assert 0 == to_engine_request(asked, replace(LIMITS, scores_prompts=True)).prompt_logprobs


def test_zero_is_not_treated_as_absent():
    """Zero is a value and does not mean absent."""
    given = {
        "temperature": 0.0,
        "top_p": 0.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.0,
        "seed": 0,
        "logit_bias": {0: -100.0, 63: 100.0},
        "allowed_token_ids": array("q", [0]),
    }
    request = to_engine_request(_start(given, top_logprobs=0), LIMITS)

    assert given == {name: getattr(request.sampling, name) for name in given}
    assert 0 == request.top_logprobs


def test_seeds_are_fresh_unless_given():
    """Requests without a seed, or with -1, get different seeds; other negative ones are seeds."""
    for sampling in ({}, {"seed": -1}):
        seeds = {to_engine_request(_start(sampling), LIMITS).sampling.seed for _ in range(9)}

        assert 9 == len(seeds)
    assert -2 == to_engine_request(_start({"seed": -2}), LIMITS).sampling.seed
    assert -(2**63) == to_engine_request(_start({"seed": -(2**63)}), LIMITS).sampling.seed


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"revision": ""}, "missing_required_parameter", "revision"),
        ({"prompt_token_ids": []}, "empty_array", "prompt_token_ids"),
        ({"prompt_token_ids": [3, 64]}, "invalid_value", "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "invalid_value", "prompt_token_ids"),
        ({"prompt_token_ids": [3] * 32}, "context_length_exceeded", "prompt_token_ids"),
        ({"stop_token_ids": [64]}, "invalid_value", "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids"),
        ({"n": 0}, "integer_below_min_value", "n"),
        ({"n": -1}, "integer_below_min_value", "n"),
        ({"n": 9}, "integer_above_max_value", "n"),
        ({"max_new_tokens": 0}, "integer_below_min_value", "max_new_tokens"),
        ({"min_new_tokens": -1}, "integer_below_min_value", "min_new_tokens"),
        ({"top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"top_logprobs": -1}, "integer_below_min_value", "top_logprobs"),
    ],
)
def test_wrong_fields_are_named(fields, code, param):
    """With the code of the error table, and the field as param."""
    error = _error(_start(**fields))

    assert (code, param) == (error.code, error.param)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("temperature", -0.01, "decimal_below_min_value"),
        ("temperature", 2.01, "decimal_above_max_value"),
        ("temperature", math.nan, "invalid_value"),
        ("temperature", math.inf, "invalid_value"),
        ("top_p", -0.01, "decimal_below_min_value"),
        ("top_p", 1.01, "decimal_above_max_value"),
        ("top_p", math.nan, "invalid_value"),
        ("top_k", -2, "integer_below_min_value"),
        ("min_p", -0.01, "decimal_below_min_value"),
        ("min_p", 1.01, "decimal_above_max_value"),
        ("min_p", -math.inf, "invalid_value"),
        ("presence_penalty", -2.01, "decimal_below_min_value"),
        ("presence_penalty", 2.01, "decimal_above_max_value"),
        ("frequency_penalty", -2.01, "decimal_below_min_value"),
        ("frequency_penalty", 2.01, "decimal_above_max_value"),
        ("frequency_penalty", math.nan, "invalid_value"),
        ("repetition_penalty", 0.0, "decimal_below_min_value"),
        ("repetition_penalty", -1.0, "decimal_below_min_value"),
        ("repetition_penalty", 10.01, "decimal_above_max_value"),
        ("repetition_penalty", math.nan, "invalid_value"),
    ],
)
def test_sampling_out_of_range_is_named(field, value, code):
    """The message repeats field and value, so that the caller sees what arrived."""
    error = _error(_start({field: value}))

    assert (code, f"sampling.{field}") == (error.code, error.param)
    assert field in error.message


@pytest.mark.parametrize(
    ("bias", "code", "param"),
    [
        ({64: 1.0}, "invalid_value", "sampling.logit_bias"),
        ({-1: 1.0}, "invalid_value", "sampling.logit_bias"),
        ({5: 100.5}, "decimal_above_max_value", "sampling.logit_bias[5]"),
        ({5: -100.5}, "decimal_below_min_value", "sampling.logit_bias[5]"),
        ({5: math.nan}, "invalid_value", "sampling.logit_bias[5]"),
    ],
)
def test_logit_bias_is_checked_by_id_and_by_value(bias, code, param):
    """The param names the token id whose bias is out of range."""
    error = _error(_start({"logit_bias": bias}))

    assert (code, param) == (error.code, error.param)


def test_logit_bias_has_at_most_16384_entries():
    """As sampling.proto says, for the generator's callers too."""
    many = {"logit_bias": dict.fromkeys(range(16_385), 1.0)}
    limits = replace(LIMITS, vocabulary_size=20_000)
    with pytest.raises(ServiceError) as caught:
        to_engine_request(_start(many), limits)
    del many["logit_bias"][0]

    assert ("invalid_value", "sampling.logit_bias") == (caught.value.code, caught.value.param)
    assert 16_384 == len(to_engine_request(_start(many), limits).sampling.logit_bias)


def test_a_minimum_needs_a_token_that_may_come_before_it():
    """With every token a stop token nothing could be generated; without a minimum one is."""
    every = list(range(64))
    error = _error(_start(stop_token_ids=every, min_new_tokens=1))

    assert ("invalid_parameter_combination", "min_new_tokens") == (error.code, error.param)
    assert 64 == len(to_engine_request(_start(stop_token_ids=every), LIMITS).stop_token_ids)
    assert 1 == to_engine_request(_start(stop_token_ids=every[1:], min_new_tokens=1), LIMITS).n


@pytest.mark.parametrize(
    ("word", "code"), [([], "empty_array"), ([3, 64], "invalid_value"), ([-1], "invalid_value")]
)
def test_bad_words_are_sequences_of_tokens(word, code):
    """Each has at least one token of the vocabulary."""
    words = [pb.TokenSequence(token_ids=ids) for ids in ([3], word)]
    request = to_engine_request(_start(bad_words=words[:1] * 2), LIMITS)
    error = _error(_start(bad_words=words))

    assert ((3,), (3,)) == request.bad_words
    assert (code, "bad_words[1].token_ids") == (error.code, error.param)


def test_allowed_tokens_are_at_most_16384():
    """As sampling.proto says, for the generator's callers too."""
    limits = replace(LIMITS, vocabulary_size=20_000)
    with pytest.raises(ServiceError) as caught:
        to_engine_request(_start({"allowed_token_ids": range(16_385)}), limits)

    expected = ("array_above_max_length", "sampling.allowed_token_ids")
    assert expected == (caught.value.code, caught.value.param)
    assert to_engine_request(_start({"allowed_token_ids": range(16_384)}), limits)


@pytest.mark.parametrize("token_id", [64, -1])
def test_allowed_tokens_are_in_the_vocabulary(token_id):
    """The message repeats the token id."""
    error = _error(_start({"allowed_token_ids": [3, token_id]}))

    assert ("invalid_value", "sampling.allowed_token_ids") == (error.code, error.param)
    assert str(token_id) in error.message


def test_revision_mismatch_is_refused_first():
    """Token ids of another tokenizer mean nothing here."""
    error = _error(_start(revision="r2", prompt_token_ids=[999]))

    assert ("revision_mismatch", None) == (error.code, error.param)
    assert "'r1'" in error.message
    assert "'r2'" in error.message


def test_too_long_prompt_has_openais_error_message():
    """A prompt of one token less leaves room for one token."""

    assert (
        "maximum context length is 32 tokens" in _error(_start(prompt_token_ids=[3] * 32)).message
    )
    assert 1 == to_engine_request(_start(prompt_token_ids=[3] * 31), LIMITS).max_new_tokens


def test_max_new_tokens_is_capped_by_the_context():
    """max_new_tokens is an upper bound, and so is the context."""

    assert 29 == to_engine_request(_start(max_new_tokens=2**31 - 1), LIMITS).max_new_tokens
    assert 5 == to_engine_request(_start(max_new_tokens=5), LIMITS).max_new_tokens


def test_stop_tokens_add_to_the_models_eos_tokens():
    """ignore_eos drops the model's, never the caller's."""

    assert {1, 2, 9} == to_engine_request(_start(stop_token_ids=[9]), LIMITS).stop_token_ids
    assert {9} == to_engine_request(
        _start(stop_token_ids=[9], ignore_eos=True), LIMITS
    ).stop_token_ids
    assert frozenset() == to_engine_request(_start(ignore_eos=True), LIMITS).stop_token_ids


@pytest.mark.parametrize(
    "fields", [{"n": 1}, {"n": 8}, {"top_logprobs": 20}, {"min_new_tokens": 2**31 - 1}]
)
def test_limits_are_inclusive(fields):
    """The bound itself is allowed."""
    request = to_engine_request(_start(**fields), LIMITS)

    assert fields == {name: getattr(request, name) for name in fields}


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 2.0, "top_p": 1.0, "min_p": 1.0, "top_k": 2**31 - 1},
        {"top_k": -1, "presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"repetition_penalty": 10.0},
    ],
)
def test_limits_of_sampling_are_inclusive(sampling):
    """The bound itself is allowed."""
    sampled = to_engine_request(_start(sampling), LIMITS).sampling

    assert sampling == {name: getattr(sampled, name) for name in sampling}


def _group(n=1):
    return SequenceGroup(EngineRequest((3, 4), 9, n=n), Admission(1, 9).enter(2))


def test_updates_are_merged_by_continuation():
    """One message holds all tokens since the last one, and how each choice ended."""
    group = _group(n=2)
    first, second = group.sequences
    updates = []
    for sequence, token_id in ((first, 7), (second, 8), (first, 9)):
        sequence.append(token_id)
        updates.append(SequenceUpdate(group, sequence, SampledToken(token_id)))
    first.finish_reason, first.device_nanoseconds = FinishReason.LENGTH, 2**40
    first.cached_prompt_tokens = 1
    updates.append(SequenceUpdate(group, first, is_finished=True))
    one, other = to_response(updates).updates

    assert (0, [7, 9]) == (one.index, list(one.token_ids))
    assert (1, [8]) == (other.index, list(other.token_ids))
    assert not other.HasField("finished")
    expected = pb.Finished(
        reason=pb.FINISH_REASON_LENGTH,
        completion_tokens=2,
        prompt_tokens=2,
        cached_prompt_tokens=1,
        device_nanoseconds=2**40,
    )
    assert expected == one.finished


def test_each_token_has_its_logprobs():
    """There is one for each token, alternatives included."""
    group = _group()
    sampled = SampledToken(5, TokenLogprobs(-0.5, (5, 6), (-0.5, -1.5)))
    [update] = to_response([SequenceUpdate(group, group.sequences[0], sampled)]).updates

    expected = pb.TokenLogprobs(logprob=-0.5, top_token_ids=[5, 6], top_logprobs=[-0.5, -1.5])
    assert [expected] == list(update.logprobs)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (FinishReason.STOP_TOKEN, pb.FINISH_REASON_STOP_TOKEN),
        (FinishReason.STOPPED, pb.FINISH_REASON_STOPPED),
    ],
)
def test_finish_reasons_have_their_names(reason, expected):
    """The two finish reasons other than length."""
    group = _group()
    group.sequences[0].finish_reason = reason
    [update] = to_response([SequenceUpdate(group, group.sequences[0], is_finished=True)]).updates

    assert expected == update.finished.reason
