"""Options shared by /v1/chat/completions and /v1/completions: sampling, limits, streaming."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from rest_facade.requests.field import (
    Strict,
    field_error,
    field_error_of,
    reject_unsupported,
    within,
)
from rest_facade.requests.structured_output import ALIASES, StructuredOutputFields
from trivium.field_errors import contradiction, too_many_entries
from trivium.limits import (
    LOGIT_BIAS,
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORDS,
    MAX_COMPLETION_TOKENS,
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MIN_TOKENS,
    SAMPLING,
    SEED,
    TOKEN_ID,
    TOP_LOGPROBS,
    TRUNCATE_PROMPT_TOKENS,
    N,
)


class StreamOptions(Strict):
    """What a stream contains besides the text."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: token counts in every chunk."
    )


MAX_LABELS = 16


def _as_strings(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise field_error("invalid_type", "one of a string or array of strings")
    return value


def _stop_string(value: str) -> str:
    if not value:
        raise field_error("invalid_value", "Invalid '{param}': a stop string cannot be empty.")
    return value


_StopString = Annotated[
    str,
    Field(max_length=MAX_STOP_CHARACTERS, json_schema_extra={"minLength": 1}),
    AfterValidator(_stop_string),
]
_Stops = Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
Stop = Annotated[_Stops, BeforeValidator(_as_strings, json_schema_input_type=str | _Stops)]


def _token_keys(value: dict[str, float]) -> dict[str, float]:
    if len(value) > MAX_LOGIT_BIASES:
        raise field_error_of(too_many_entries("{param}", MAX_LOGIT_BIASES))
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) in TOKEN_ID):
            raise field_error(
                "invalid_value",
                f"Invalid key in '{{param}}': {key[:40]!r}. Keys are token ids: "
                "strings of non-negative integers.",
            )
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    if len(value) > MAX_LABELS:
        raise field_error_of(too_many_entries("{param}", MAX_LABELS))
    for key, label in value.items():
        if len(key) > 64 or len(label) > 512:
            raise field_error(
                "string_above_max_length",
                "Invalid '{param}': keys have at most 64 characters, values at most 512.",
            )
    return value


Bias = Annotated[float, within(LOGIT_BIAS)]
Biases = Annotated[dict[str, Bias], AfterValidator(_token_keys)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Count = Annotated[int, within(MAX_COMPLETION_TOKENS)]
TokenId = Annotated[int, within(TOKEN_ID)]
AllowedTokens = Annotated[
    list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS, fail_fast=True)
]
BadWords = Annotated[
    list[Annotated[str, Field(max_length=MAX_BAD_WORD_CHARACTERS)]],
    Field(max_length=MAX_BAD_WORDS, fail_fast=True),
]
StopTokens = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)]
_UnsupportedTiers = reject_unsupported("flex", "scale", "priority", "fast")


class SamplingFields(Strict):
    """Fields for how choices are sampled, where they end and how they are sent."""

    temperature: Annotated[float, within(SAMPLING["temperature"])] | None = Field(
        None, description="0 is greedy."
    )
    top_p: Annotated[float, within(SAMPLING["top_p"])] | None = Field(
        None, description="0 keeps the most likely token only."
    )
    top_k: Annotated[int, within(SAMPLING["top_k"])] | None = Field(
        None, description="0 and -1 mean all."
    )
    min_p: Annotated[float, within(SAMPLING["min_p"])] | None = Field(
        None, description="Minimum probability, as a share of the most likely token's."
    )
    presence_penalty: Annotated[float, within(SAMPLING["presence_penalty"])] | None = None
    frequency_penalty: Annotated[float, within(SAMPLING["frequency_penalty"])] | None = None
    repetition_penalty: Annotated[float, within(SAMPLING["repetition_penalty"])] | None = None
    top_n_sigma: Annotated[float, within(SAMPLING["top_n_sigma"])] | None = Field(
        None, description="Standard deviations below the highest logit; 0 and -1 mean all."
    )
    logit_bias: Biases | None = Field(None, description="Added to logits, by token id.")
    allowed_token_ids: AllowedTokens | None = Field(
        None, description="The only tokens that may be generated."
    )
    bad_words: BadWords | None = Field(
        None, description="Texts that are not generated, with or without a space before them."
    )
    max_completion_tokens: Count | None = Field(
        None,
        description="Maximum number of tokens per choice. Default: up to the context length.",
    )
    max_tokens: Count | None = Field(None, description="The same, under its old name.")
    min_tokens: Annotated[int, within(MIN_TOKENS)] | None = None
    ignore_eos: bool | None = Field(None, description="Continue past end-of-sequence tokens.")
    stop: Stop | None = Field(None, description="At most 4 strings that end a choice.")
    stop_token_ids: StopTokens | None = Field(
        None, description="Token ids that end a choice, besides the model's own."
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Whether the stop string or stop token is in the text. Default false."
    )
    skip_special_tokens: bool | None = Field(
        None, description="Whether control tokens are left out of the text. Default true."
    )
    truncate_prompt_tokens: Annotated[int, within(TRUNCATE_PROMPT_TOKENS)] | None = Field(
        None,
        description="Keep only the last so many tokens of the prompt; -1 for as many as fit the "
        "context beside the maximum number of tokens.",
    )
    prompt_logprobs: Annotated[int, within(TOP_LOGPROBS)] | None = Field(
        None,
        description="Log-probabilities of the prompt's tokens and of this many most likely ones; "
        "not with stream.",
    )
    return_token_ids: bool | None = Field(
        None, description="Whether the answer has the token ids of prompts and choices."
    )
    seed: Annotated[int, within(SEED)] | None = None
    n: Annotated[int, within(N)] | None = Field(None, description="How many choices.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="The end user, for the logs.")
    metadata: Labels | None = Field(None, description="The caller's own labels.")
    service_tier: Annotated[Literal["auto", "default"], _UnsupportedTiers] | None = Field(
        None, description="There is one tier; the answer says 'default' if this is given."
    )
    prompt_cache_key: str | None = Field(
        None,
        max_length=512,
        description="Accepted and ignored: the prefix cache finds prefixes by their tokens.",
    )
    safety_identifier: str | None = Field(None, max_length=512, description="Accepted and ignored.")

    def max_tokens_per_choice(self) -> int | None:
        """The limit on tokens per choice, from either field."""
        named = self.max_completion_tokens
        return self.max_tokens if named is None else named

    def check_sampling(self) -> None:
        """Raises ServiceError for fields that contradict each other."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise contradiction("stream_options", "is only allowed when 'stream' is enabled.")
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise contradiction(
                "stream_options.continuous_usage_stats", "is only allowed with 'include_usage'."
            )
        if self.prompt_logprobs is not None and self.stream:
            raise contradiction("prompt_logprobs", "is not available when 'stream' is enabled.")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise contradiction(
                "max_tokens", "and 'max_completion_tokens' differ; give only the latter."
            )
        limit = self.max_tokens_per_choice()
        if self.min_tokens and limit is not None and self.min_tokens > limit:
            raise contradiction("min_tokens", f"is above the maximum of {limit} tokens.")


class SharedOptions(StructuredOutputFields, SamplingFields):
    """Fields for how choices are formatted and sampled, where they end and how they are sent."""

    def client_names(self) -> dict[str, str]:
        """The client's names of fields, by the names that the next stage uses if they differ."""
        names = {}
        if self.max_tokens is not None:
            names["max_completion_tokens"] = "max_tokens"
        for name in self.constraints():
            if name in ALIASES:
                names[f"structured_outputs.{ALIASES[name]}"] = name
                names["structured_outputs"] = name
        bare = self.response_format.bare_schema() if self.response_format is not None else None
        if bare is not None:
            names["response_format.json_schema.schema"] = f"response_format.{bare[0]}"
        return names
