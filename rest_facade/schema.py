"""The request as pydantic models: types and ranges, strictly. Knows nothing of HTTP or protobuf.

`null` for an optional field is the same as its absence. Unknown fields are ignored; known ones
that are not supported are refused by `unsupported`. The order of fields is that of blame.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from rest_facade.unsupported import refuse_unsupported
from trivium.wire.errors import ServiceError

FAULT = "fault"
INT32_MAX = 2**31 - 1

Role = Literal["system", "developer", "user", "assistant", "tool"]
_FOREIGN_PARTS = ("image_url", "input_audio", "file", "refusal", "video_url", "audio_url")


def fault(code: str, message: str) -> PydanticCustomError:
    """An error with a code of the table; `{param}` in `message` becomes the field's name."""
    return PydanticCustomError(FAULT, "{message}", {"code": code, "message": message})


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def _supported_part(kind: str) -> str:
    if kind in _FOREIGN_PARTS:
        raise fault("unsupported_value", f"Content parts of type '{kind}' are not supported.")
    if kind != "text":
        raise fault("invalid_value", f"Invalid value: '{kind}'. Supported values are: 'text'.")
    return kind


class ContentPart(_Strict):
    """A piece of a message's content."""

    type: Annotated[str, AfterValidator(_supported_part)] = Field(
        description="Only 'text' is supported.", json_schema_extra={"enum": ["text"]}
    )
    text: str = Field(description="The text.")


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [ContentPart.model_construct(type="text", text=value)]
    if not isinstance(value, list):
        raise fault("invalid_type", "one of a string or array of objects")
    return value


_Parts = Annotated[list[ContentPart], Field(min_length=1, fail_fast=True)]
Content = Annotated[_Parts, BeforeValidator(_as_parts, json_schema_input_type=str | _Parts)]


class FunctionCall(_Strict):
    """The function an earlier tool call named, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A tool call that an assistant message of the conversation made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


def _known_role(role: str) -> str:
    if role == "function":
        raise fault(
            "unsupported_value", "Messages with role 'function' are not supported; use 'tool'."
        )
    return role


class ChatMessage(_Strict):
    """One message of the conversation."""

    role: Annotated[Role, BeforeValidator(_known_role, json_schema_input_type=Role)]
    content: Content | None = Field(
        None, description="Text, or text parts. Only an assistant's may be null."
    )
    name: str | None = Field(None, max_length=256, description="The speaker's name.")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, description="The call that a tool message answers.")


class StreamOptions(_Strict):
    """What a stream contains besides the text."""

    include_usage: bool | None = Field(None, description="Send one chunk with the usage at last.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: token counts in every chunk."
    )


def _as_strings(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise fault("invalid_type", "one of a string or array of strings")
    return value


def _stop_string(value: str) -> str:
    if not value:
        raise fault("invalid_value", "Invalid '{param}': a stop string cannot be empty.")
    return value


_StopString = Annotated[str, Field(max_length=4096), AfterValidator(_stop_string)]
_Stops = Annotated[list[_StopString], Field(max_length=4, fail_fast=True)]
Stop = Annotated[_Stops, BeforeValidator(_as_strings, json_schema_input_type=str | _Stops)]


def _token_keys(value: dict[str, float]) -> dict[str, float]:
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= INT32_MAX):
            raise fault(
                "invalid_value",
                f"Invalid key in '{{param}}': {key[:40]!r}. Keys are token ids: "
                "strings of non-negative integers.",
            )
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    if len(value) > 16:
        raise fault("invalid_value", "Invalid '{param}': more than 16 entries.")
    for key, label in value.items():
        if len(key) > 64 or len(label) > 512:
            raise fault(
                "string_above_max_length",
                "Invalid '{param}': keys have at most 64 characters, values at most 512.",
            )
    return value


Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1, le=INT32_MAX)]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model: str = Field(description="The model's id, as GET /v1/models gives it.")
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] = Field(
        description="The conversation so far, oldest first."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="0 keeps the likeliest token.")
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX, description="0 and -1 mean all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Share of the likeliest token.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: Annotated[dict[str, Bias], AfterValidator(_token_keys)] | None = Field(
        None, description="Added to logits, by token id."
    )
    max_completion_tokens: Count | None = Field(
        None, description="Longest answer in tokens, per choice. Default: the context's end."
    )
    max_tokens: Count | None = Field(None, description="The old name of max_completion_tokens.")
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    ignore_eos: bool | None = Field(None, description="Go on past end-of-sequence tokens.")
    stop: Stop | None = Field(None, description="At most 4 strings that end a choice.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=128, description="How many choices.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Needs logprobs.")
    user: str | None = Field(None, max_length=512, description="Who asks, for the logs.")
    metadata: Annotated[dict[str, str], AfterValidator(_labels)] | None = None

    def longest_answer(self) -> int | None:
        """The limit on tokens per choice, under whichever name it was given."""
        named = self.max_completion_tokens
        return self.max_tokens if named is None else named


def check_meaning(request: ChatRequest, raw: Mapping[str, Any]) -> None:
    """Raises for fields of `raw` that are not supported, then for fields that contradict."""
    refuse_unsupported(raw)
    _check_stream_options(request)
    _check_lengths(request)
    if request.top_logprobs and not request.logprobs:
        raise _contradiction("top_logprobs", "is only allowed when 'logprobs' is true.")
    for position, message in enumerate(request.messages):
        _check_message(message, f"messages[{position}]")


def _contradiction(param: str, why: str) -> ServiceError:
    return ServiceError(
        "invalid_parameter_combination", f"The '{param}' parameter {why}", param=param
    )


def _check_stream_options(request: ChatRequest) -> None:
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        raise _contradiction("stream_options", "is only allowed when 'stream' is enabled.")
    if options.continuous_usage_stats and not options.include_usage:
        raise _contradiction(
            "stream_options.continuous_usage_stats", "is only allowed with 'include_usage'."
        )


def _check_lengths(request: ChatRequest) -> None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise _contradiction(
            "max_tokens", "and 'max_completion_tokens' differ; give only the latter."
        )
    longest = request.longest_answer()
    if request.min_tokens and longest is not None and request.min_tokens > longest:
        raise _contradiction("min_tokens", f"is above the longest answer, {longest} tokens.")


def _check_message(message: ChatMessage, place: str) -> None:
    if message.content is None and message.role != "assistant":
        raise ServiceError(
            "missing_required_parameter",
            f"Missing required parameter: '{place}.content'.",
            param=f"{place}.content",
        )
    if message.tool_calls and message.role != "assistant":
        raise ServiceError(
            "invalid_value",
            "Only messages with role 'assistant' have 'tool_calls'.",
            param=f"{place}.tool_calls",
        )
    if message.role == "tool" and message.tool_call_id is None:
        raise ServiceError(
            "missing_required_parameter",
            f"Missing required parameter: '{place}.tool_call_id'.",
            param=f"{place}.tool_call_id",
        )
