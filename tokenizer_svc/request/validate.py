"""Validates requests against the ranges that chat.proto and completion.proto document.

Raises ServiceError with OpenAI's codes and wording, with the field's JSON name as `param`. The
generator checks its own limits.
"""

from collections.abc import Sequence
from dataclasses import replace

from tokenizer_svc.request.field_checks import (
    check_length,
    check_optional,
    check_token_ids,
)
from tokenizer_svc.request.types import (
    ChatRequest,
    CompletionRequest,
    RequestOptions,
    ValidOptions,
    ValidRequest,
)
from tokenizer_svc.request.validate_constraint import valid_response_constraint
from tokenizer_svc.request.validate_conversation import check_conversation
from tokenizer_svc.request.validate_tools import tool_use
from trivium.field_errors import (
    check_array,
    check_nonempty,
    check_number,
    contradiction,
    empty_string,
    missing,
)
from trivium.limits import (
    COMPLETION_LOGPROBS,
    LOGIT_BIAS,
    MAX_BAD_WORD_CHARACTERS,
    MAX_COMPLETION_TOKENS,
    MAX_PROMPT_LOGPROBS,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MIN_TOKENS,
    PLAIN_COMPLETION_TOKENS,
    SAMPLING,
    TOP_LOGPROBS,
    TRUNCATE_PROMPT_TOKENS,
    N,
    Range,
)
from trivium.sampling.v1.sampling_pb2 import SamplingParams
from trivium.wire.errors import ServiceError

COMPLETION_TOKENS = 16  # the default max_tokens of a plain completion


def validate(request: ChatRequest, vocabulary_size: int) -> ValidRequest:
    """The validated request; raises ServiceError for the first invalid field."""
    check_conversation(request.conversation)
    options = valid_options(request.options, vocabulary_size)
    check_optional("top_logprobs", request.top_logprobs, TOP_LOGPROBS)
    if request.top_logprobs is not None and not request.logprobs:
        raise contradiction("top_logprobs", "is only allowed when 'logprobs' is enabled.")
    if request.logprobs:
        options = replace(options, top_logprobs=request.top_logprobs or 0)
    tools = request.conversation.tools
    use = tool_use(tools, request.tool_choice, request.parallel_tool_calls)
    is_constrained = options.response_constraint is not None
    if use.forced and is_constrained and request.options.structured_outputs is not None:
        message = "'structured_outputs' cannot be used when 'tool_choice' forces a call."
        raise ServiceError("invalid_parameter_combination", message, "structured_outputs")
    # A model that may not call tools is not told about them.
    conversation = request.conversation if use.tools else replace(request.conversation, tools=())
    return ValidRequest(conversation, options, use)


def validate_completion(request: CompletionRequest, vocabulary_size: int) -> ValidOptions:
    """The options of a plain completion; raises ServiceError for the first invalid field."""
    check_nonempty("prompt", request.prompts)
    check_array("prompt", request.prompts, MAX_PROMPTS)
    several = len(request.prompts) > 1
    for index, prompt in enumerate(request.prompts):
        field = f"prompt[{index}]" if several else "prompt"
        if prompt is None:
            raise missing(field)
        if isinstance(prompt, tuple):
            check_nonempty(field, prompt)
            check_token_ids(field, prompt, vocabulary_size)
    options = valid_options(request.options, vocabulary_size, PLAIN_COMPLETION_TOKENS)
    check_optional("logprobs", request.logprobs, COMPLETION_LOGPROBS)
    max_tokens = options.max_completion_tokens
    if max_tokens is None:
        max_tokens = max(COMPLETION_TOKENS, options.min_tokens)
    return replace(
        options,
        max_completion_tokens=max_tokens,
        top_logprobs=request.logprobs,
        echo_logprobs=request.logprobs if request.echo else None,
    )


def check_prompt_logprobs(options: ValidOptions, tokens: int, copies: int = 1) -> None:
    """Raises ServiceError if an answer would have too many, for prompts of so many tokens, each in
    so many copies: they cost the device little, but every stage a lot."""
    count = copies * tokens * sum(1 + k for k in options.prompt_alternatives)
    if count <= MAX_PROMPT_LOGPROBS:
        return
    param = "logprobs" if options.prompt_logprobs is None else "prompt_logprobs"
    message = (
        f"Invalid '{param}': an answer has at most {MAX_PROMPT_LOGPROBS} log-probabilities of "
        f"prompts, alternatives included, but this one would have {count}."
    )
    raise ServiceError("invalid_value", message, param)


def valid_options(
    options: RequestOptions, vocabulary_size: int, longest: Range = MAX_COMPLETION_TOKENS
) -> ValidOptions:
    """Validates what chat and plain completions share: all options except log-probabilities.

    `longest` is the range of `max_completion_tokens`.
    """
    _check_sampling(options.sampling, vocabulary_size)
    check_optional("max_completion_tokens", options.max_completion_tokens, longest)
    check_optional("min_tokens", options.min_tokens, MIN_TOKENS)
    check_optional("n", options.n, N)
    check_optional("truncate_prompt_tokens", options.truncate_prompt_tokens, TRUNCATE_PROMPT_TOKENS)
    check_optional("prompt_logprobs", options.prompt_logprobs, TOP_LOGPROBS)
    if options.truncate_prompt_tokens == 0:
        message = "Invalid 'truncate_prompt_tokens': expected -1, or 1 or more, but got 0 instead."
        raise ServiceError("invalid_value", message, "truncate_prompt_tokens")
    _check_stop(options.stop)
    check_array("stop_token_ids", options.stop_token_ids, MAX_STOP_TOKENS)
    check_token_ids("stop_token_ids", options.stop_token_ids, vocabulary_size)
    for index, word in enumerate(options.bad_words):
        check_length(f"bad_words[{index}]", word, MAX_BAD_WORD_CHARACTERS)
    max_tokens, min_tokens = options.max_completion_tokens, options.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        message = (
            f"'min_tokens' is {min_tokens}, more than 'max_completion_tokens', which is "
            f"{max_tokens}."
        )
        raise ServiceError("invalid_parameter_combination", message, "min_tokens")
    return ValidOptions(
        sampling=options.sampling,
        max_completion_tokens=options.max_completion_tokens,
        min_tokens=options.min_tokens or 0,
        ignore_eos=bool(options.ignore_eos),
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        bad_words=options.bad_words,
        include_stop=bool(options.include_stop),
        skip_special_tokens=options.skip_special_tokens is not False,
        n=1 if options.n is None else options.n,
        top_logprobs=None,
        response_constraint=valid_response_constraint(
            options.response_format, options.structured_outputs
        ),
        return_token_ids=options.return_token_ids,
        truncate_prompt_tokens=options.truncate_prompt_tokens,
        prompt_logprobs=options.prompt_logprobs,
    )


def _check_sampling(sampling: SamplingParams, vocabulary_size: int) -> None:
    for name, allowed in SAMPLING.items():
        if sampling.HasField(name):
            check_number(name, getattr(sampling, name), allowed)
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < vocabulary_size:
            text = (
                f"Invalid key in 'logit_bias': {token_id}. "
                f"Expected a token id from 0 to {vocabulary_size - 1}."
            )
            raise ServiceError("invalid_value", text, "logit_bias")
        check_number("logit_bias", bias, LOGIT_BIAS)
    check_token_ids("allowed_token_ids", sampling.allowed_token_ids, vocabulary_size)


def _check_stop(stop: Sequence[str]) -> None:
    check_array("stop", stop, MAX_STOP_STRINGS)
    for index, string in enumerate(stop):
        if not string:
            raise empty_string(f"stop[{index}]")
        check_length(f"stop[{index}]", string, MAX_STOP_CHARACTERS)
