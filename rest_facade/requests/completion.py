"""The body of POST /v1/completions: prompts as text or token ids, and options."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rest_facade.requests.field import Body, Strict, field_error, within
from rest_facade.requests.options import SharedOptions, TokenId
from rest_facade.requests.unsupported import refuse_unsupported_completion
from trivium.limits import (
    COMPLETION_LOGPROBS,
    MAX_PROMPTS,
    MAX_TOKEN_IDS,
    PLAIN_COMPLETION_TOKENS,
    TOKEN_ID,
)


def _as_prompts(value: Any) -> Any:
    """`value` as a list of prompts, from any of its four forms."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise field_error(
            "invalid_type", "one of a string, array of strings, or array of token ids or of such"
        )
    if value and _is_int(value[0]):
        return [value]
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise field_error("invalid_type", "one of a string or array of token ids")
    if not value:
        raise field_error("empty_array", "Invalid '{param}': a prompt needs at least one token.")
    for position, token in enumerate(value):
        if not _is_int(token):
            raise field_error("invalid_type", "token ids: an array of integers")
        if token not in TOKEN_ID:
            raise field_error(
                "invalid_value", f"Invalid '{{param}}': the token id at {position} is out of range."
            )
    return value


_TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS)]
_Prompt = Annotated[Any, BeforeValidator(_prompt, json_schema_input_type=str | _TokenIds)]
_Prompts = Annotated[
    list[_Prompt],
    Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
    BeforeValidator(
        _as_prompts, json_schema_input_type=str | list[str] | _TokenIds | list[_TokenIds]
    ),
]


class _Prompted(Strict):
    model: str = Field(description="The model's id, as GET /v1/models gives it.")
    prompt: _Prompts = Field(description="One prompt or several, as text or token ids.")


class TextCompletionRequest(SharedOptions, _Prompted, Body):
    """The body of POST /v1/completions. `max_tokens` is 16 by default, as with OpenAI."""

    echo: bool | None = Field(
        None,
        description="Whether the text begins with the prompt, and the log-probabilities with those "
        "of its tokens.",
    )
    max_completion_tokens: Annotated[int, within(PLAIN_COMPLETION_TOKENS)] | None = Field(
        None, description="Maximum number of tokens per choice; 0 to echo or score the prompt."
    )
    max_tokens: Annotated[int, within(PLAIN_COMPLETION_TOKENS)] | None = Field(
        None, description="The same: OpenAI's name. Default 16."
    )
    add_special_tokens: bool | None = Field(
        None, description="Add special tokens such as BOS to a text prompt. Default true."
    )
    logprobs: Annotated[int, within(COMPLETION_LOGPROBS)] | None = Field(
        None, description="Log-probabilities of the tokens and of this many most likely ones."
    )

    def check(self, raw: Mapping[str, Any]) -> None:
        refuse_unsupported_completion(raw)
        self.check_sampling()
        self.check_constraint()
