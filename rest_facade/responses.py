"""Response bodies as typed JSON objects: OpenAI's schema, plus `gpu_seconds` in the usage,
`reasoning_content` next to the content, and, if requested, vLLM's `prompt_token_ids`, `token_ids`
and `prompt_logprobs`.

The type checker checks `convert` against these, and the OpenAPI document is built from them.
"""

from typing import Annotated, Literal, NotRequired

from pydantic import Field

# pydantic supports typing.TypedDict only from Python 3.12 on.
from typing_extensions import TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]
ServiceTier = Literal["default"]


class TopLogprob(TypedDict):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatCompletionTokenLogprob(TypedDict):
    """The log-probability of a generated token, and of the most likely ones at its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatCompletionTokenLogprob]
    refusal: None


class PromptLogprob(TypedDict):
    """The log-probability of a token at a position of the prompt, in vLLM's format."""

    logprob: float
    rank: int
    decoded_token: str


# By token id at each position: the prompt's token, then the most likely others; null at the first.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class PromptTokensDetails(TypedDict):
    """A breakdown of the prompt's token count."""

    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(TypedDict):
    """A breakdown of the completion's token count."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(TypedDict):
    """The usage of a request. `gpu_seconds` is its exact share of the device's busy time."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    gpu_seconds: float
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class UsageSoFar(TypedDict):
    """Token counts in the middle of a stream (`continuous_usage_stats`)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionCall(TypedDict):
    """A function's name, and the JSON text of its arguments."""

    name: str
    arguments: str


class MessageToolCall(TypedDict):
    """A tool call by the model."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatCompletionMessage(TypedDict):
    """The model's message; `content` is null if it only reasoned or called tools.

    `annotations` is always empty: there is no web search.
    """

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: Annotated[list[object], Field(max_length=0)]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[MessageToolCall]]


class Choice(TypedDict):
    """One choice."""

    index: int
    message: ChatCompletionMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The response to a chat request without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    service_tier: NotRequired[ServiceTier]
    system_fingerprint: str
    choices: list[Choice]
    usage: CompletionUsage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class FunctionCallDelta(TypedDict):
    """The name comes once, first; the fragments of arguments are to be concatenated."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """A fragment of a tool call: the first has all fields, the others index and arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class ChoiceDelta(TypedDict):
    """What is new in a choice; empty in its last chunk."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(TypedDict):
    """A fragment of one choice."""

    index: int
    delta: ChoiceDelta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """One `data:` event of a streamed chat completion; only the first has `prompt_token_ids`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: NotRequired[ServiceTier]
    system_fingerprint: str
    prompt_token_ids: NotRequired[list[int]]
    choices: list[ChunkChoice]
    usage: NotRequired[CompletionUsage | UsageSoFar | None]


class TextLogprobs(TypedDict):
    """Log-probabilities of plain completions: parallel arrays, one element for each token.

    The first token of an echoed prompt has null in both arrays of log-probabilities.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One choice of a plain completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class TextCompletion(TypedDict):
    """The response to a plain completion without `stream`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    service_tier: NotRequired[ServiceTier]
    system_fingerprint: str
    choices: list[TextChoice]
    usage: CompletionUsage


class TextChunkChoice(TypedDict):
    """A fragment of one choice of a plain completion; only its first has `prompt_token_ids`."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]


class TextCompletionChunk(TypedDict):
    """One `data:` event of a streamed plain completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    service_tier: NotRequired[ServiceTier]
    system_fingerprint: str
    choices: list[TextChunkChoice]
    usage: NotRequired[CompletionUsage | UsageSoFar | None]


class TokenizeResponse(TypedDict):
    """The token ids of a text or a conversation, in vLLM's format.

    `token_strs`, if requested, are the tokens as the vocabulary spells them.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(TypedDict):
    """The text of token ids, in vLLM's format."""

    prompt: str


class AddedToken(TypedDict):
    """A control token."""

    content: str
    special: Literal[True]


class TokenizerInfoResponse(TypedDict):
    """Information about a model's tokenizer, with the names of tokenizer_config.json."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"]
    vocab_size: int
    model_max_length: int
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    added_tokens_decoder: dict[str, AddedToken]


class ModelObject(TypedDict):
    """A model. Its context length is given under both names that clients look for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_model_len: int


class ModelList(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[ModelObject]


class ErrorInfo(TypedDict):
    """The error; `param` names the invalid field, if there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """The body of every error response."""

    error: ErrorInfo


class HealthResponse(TypedDict):
    """The body of a successful health check, with Trivium's version."""

    status: Literal["ok"]
    version: str
