"""Converts between protobuf and the engine's types, and validates requests.

Each field is validated once: what `to_engine_request` returns is valid for the model.
"""

import secrets
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

from generator_svc.sequence import (
    CompletionReport,
    EngineRequest,
    FinishReason,
    SamplingParams,
    Sequence,
    SequenceGroup,
    SequenceUpdate,
    TokenLogprobs,
)
from trivium.field_errors import (
    check_array,
    check_nonempty,
    check_number,
    contradiction,
    missing,
    too_many_entries,
)
from trivium.generator.v1 import generator_pb2 as pb
from trivium.limits import (
    LOGIT_BIAS,
    MAX_ALLOWED_TOKENS,
    MAX_COMPLETION_TOKENS,
    MAX_LOGIT_BIASES,
    MAX_PATTERN_CHARACTERS,
    MAX_SCHEMA_CHARACTERS,
    MIN_TOKENS,
    SAMPLING,
    TOP_LOGPROBS,
    N,
    Range,
)
from trivium.sampling.v1 import sampling_pb2
from trivium.wire.errors import ServiceError

CONSTRAINT = "constraint"  # the field's name in errors

_FRESH_SEED = -1  # asks for a random seed, as in vLLM and llama.cpp

_LOAD_INTERVAL_MILLISECONDS = Range(10, 5_000)
_DEFAULT_LOAD_INTERVAL_MILLISECONDS = 100

_REASONS = {
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOPPED: pb.FINISH_REASON_STOPPED,
}


@dataclass(frozen=True)
class Limits:
    """Limits of a request. `slot_length` bounds prompt plus completion tokens.

    `scores_prompts`: whether the model's graph can compute log-probabilities of prompt tokens.
    """

    revision: str
    vocabulary_size: int
    slot_length: int
    max_n: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingParams
    scores_prompts: bool = False


def to_engine_request(start: pb.StartGeneration, limits: Limits) -> EngineRequest:
    """A validated request; raises ServiceError naming the invalid field."""
    if not start.revision:
        raise missing("revision")
    if start.revision != limits.revision:
        raise ServiceError(
            "revision_mismatch",
            f"The token ids are for revision {start.revision!r} of the model, but revision "
            f"{limits.revision!r} is loaded.",
        )
    prompt = tuple(start.prompt_token_ids)
    if not prompt:
        raise ServiceError("empty_array", "The prompt has no tokens.", "prompt_token_ids")
    _check_ids(prompt, limits, "prompt_token_ids")
    remaining = limits.slot_length - len(prompt)
    if remaining < 1:
        raise ServiceError(
            "context_length_exceeded",
            f"This model's maximum context length is {limits.slot_length} tokens. However, your "
            f"messages resulted in {len(prompt)} tokens. Please reduce the length of the messages.",
            "prompt_token_ids",
        )
    max_new_tokens = start.max_new_tokens if start.HasField("max_new_tokens") else remaining
    check_number("max_new_tokens", max_new_tokens, MAX_COMPLETION_TOKENS)
    n = start.n if start.HasField("n") else 1
    check_number("n", n, Range(N.minimum, limits.max_n))
    check_number("min_new_tokens", start.min_new_tokens, MIN_TOKENS)
    top_logprobs = start.top_logprobs if start.HasField("top_logprobs") else None
    check_number("top_logprobs", top_logprobs or 0, TOP_LOGPROBS)
    prompt_logprobs = start.prompt_logprobs if start.HasField("prompt_logprobs") else None
    check_number("prompt_logprobs", prompt_logprobs or 0, TOP_LOGPROBS)
    if prompt_logprobs is not None and not limits.scores_prompts:
        raise ServiceError(
            "unsupported_parameter",
            "This model's folder does not support log-probabilities of prompts; export it again.",
            "prompt_logprobs",
        )
    return EngineRequest(
        prompt=prompt,
        max_new_tokens=min(max_new_tokens, remaining),
        sampling=_to_sampling(start.sampling, limits),
        n=n,
        min_new_tokens=start.min_new_tokens,
        stop_token_ids=_stop_ids(start, limits),
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        bad_words=tuple(_to_bad_word(word, limits, i) for i, word in enumerate(start.bad_words)),
    )


def _stop_ids(start: pb.StartGeneration, limits: Limits) -> frozenset[int]:
    _check_ids(start.stop_token_ids, limits, "stop_token_ids")
    stop_ids = {*start.stop_token_ids}
    if not start.ignore_eos:
        stop_ids.update(limits.eos_token_ids)
    if start.min_new_tokens and len(stop_ids) == limits.vocabulary_size:
        raise contradiction("min_new_tokens", "needs a token that does not end the continuation.")
    return frozenset(stop_ids)


def _to_bad_word(word: pb.TokenSequence, limits: Limits, index: int) -> tuple[int, ...]:
    field = f"bad_words[{index}].token_ids"
    check_nonempty(field, word.token_ids)
    _check_ids(word.token_ids, limits, field)
    return tuple(word.token_ids)


def _to_sampling(params: sampling_pb2.SamplingParams, limits: Limits) -> SamplingParams:
    values = {name: getattr(params, name) for name in SAMPLING if params.HasField(name)}
    for name, value in values.items():
        check_number(f"sampling.{name}", value, SAMPLING[name])
    bias = dict(params.logit_bias)
    if len(bias) > MAX_LOGIT_BIASES:
        raise too_many_entries("sampling.logit_bias", MAX_LOGIT_BIASES)
    _check_ids(bias, limits, "sampling.logit_bias")
    for token_id, value in bias.items():
        check_number(f"sampling.logit_bias[{token_id}]", value, LOGIT_BIAS)
    check_array("sampling.allowed_token_ids", params.allowed_token_ids, MAX_ALLOWED_TOKENS)
    _check_ids(params.allowed_token_ids, limits, "sampling.allowed_token_ids")
    is_given = params.HasField("seed") and params.seed != _FRESH_SEED
    seed = params.seed if is_given else secrets.randbits(63)
    allowed = array("q", params.allowed_token_ids)
    return replace(limits.defaults, **values, logit_bias=bias, allowed_token_ids=allowed, seed=seed)


def _check_ids(ids: Iterable[int], limits: Limits, field: str) -> None:
    for token_id in ids:
        if not 0 <= token_id < limits.vocabulary_size:
            raise ServiceError(
                "invalid_value",
                f"Invalid '{field}': {token_id} is not in the vocabulary, which has "
                f"{limits.vocabulary_size} tokens.",
                field,
            )


def to_load_interval(request: pb.WatchLoadRequest) -> float:
    """The minimum interval between load reports, in seconds; raises ServiceError."""
    milliseconds = _DEFAULT_LOAD_INTERVAL_MILLISECONDS
    if request.HasField("min_interval_milliseconds"):
        milliseconds = request.min_interval_milliseconds
    check_number("min_interval_milliseconds", milliseconds, _LOAD_INTERVAL_MILLISECONDS)
    return milliseconds / 1000


# In bytes of UTF-8. A Lark grammar embeds the schemas of all tools.
_MAX_CONSTRAINT_BYTES = {
    "json_schema": MAX_SCHEMA_CHARACTERS,
    "regex": MAX_PATTERN_CHARACTERS,
    "lark": 2**20,
}


def to_constraint(start: pb.StartGeneration) -> tuple[str, str] | None:
    """The constraint's kind and text, None if there is none; raises ServiceError."""
    if not start.HasField("constraint"):
        return None
    kind = start.constraint.WhichOneof("kind")
    if kind is None:
        raise ServiceError(
            "missing_required_parameter",
            "The constraint is empty: set json_schema, regex or lark.",
            CONSTRAINT,
        )
    text = getattr(start.constraint, kind)
    max_bytes = _MAX_CONSTRAINT_BYTES[kind]
    if len(text.encode()) > max_bytes:
        code = "json_schema_too_complex" if kind == "json_schema" else "string_above_max_length"
        message = f"The constraint has more than {max_bytes} bytes."
        raise ServiceError(code, message, CONSTRAINT)
    return kind, text


def to_report(report: pb.CompletionReport) -> CompletionReport:
    """The caller's report on the finished request."""
    return CompletionReport(
        report.completion_tokens, report.reasoning_tokens, tuple(report.finish_reasons)
    )


def to_response(updates: list[SequenceUpdate]) -> pb.GenerateResponse:
    """One message with all pending updates, merged by sequence."""
    by_index: dict[int, list[SequenceUpdate]] = {}
    for update in updates:
        by_index.setdefault(update.sequence.index, []).append(update)
    response = pb.GenerateResponse()
    for index, own in by_index.items():
        tokens = [update.token for update in own if update.token is not None]
        message = response.updates.add()
        message.index = index
        message.token_ids.extend([token.token_id for token in tokens])
        message.logprobs.extend(_logprobs(t.logprobs) for t in tokens if t.logprobs is not None)
        if own[-1].is_finished:
            message.finished.CopyFrom(_finished(own[-1].sequence))
    _add_prompt_logprobs(response, updates[0].group)
    return response


def _add_prompt_logprobs(response: pb.GenerateResponse, group: SequenceGroup) -> None:
    """Moves the log-probabilities of the prompt into the response, once all of them are known."""
    known = group.prompt_logprobs
    if known and len(known) == len(group.request.prompt) - 1:
        response.prompt_logprobs.extend(map(_logprobs, known))
        known.clear()


def _logprobs(found: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=found.logprob,
        top_token_ids=found.top_token_ids,
        top_logprobs=found.top_logprobs,
        rank=found.rank,
    )


def _finished(sequence: Sequence) -> pb.Finished:
    assert sequence.finish_reason in _REASONS, (
        "A call never reports this finish reason. This is a bug."
    )
    return pb.Finished(
        reason=_REASONS[sequence.finish_reason],
        completion_tokens=sequence.generated,
        prompt_tokens=sequence.prompt_length,
        cached_prompt_tokens=sequence.cached_prompt_tokens,
        device_nanoseconds=sequence.device_nanoseconds,
    )
