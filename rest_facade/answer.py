"""What the facade answers, as JSON objects: OpenAI's shapes, and `gpu_seconds` in the usage.

The type checker holds `convert` to these, and the OpenAPI document is made from them.
"""

from typing import Literal, NotRequired

# pydantic reads these, and takes typing's own TypedDict only from Python 3.12 on.
from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


class TopLogprob(TypedDict):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TypedDict):
    """The log-probability of a generated token, and of the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """Log-probabilities of a choice's tokens."""

    content: list[TokenLogprob]
    refusal: None


class PromptTokensDetails(TypedDict):
    """Parts of the prompt's token count."""

    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(TypedDict):
    """Parts of the answer's token count."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """What a request cost. `gpu_seconds` is its exact share of the device's busy time."""

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


class Message(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(TypedDict):
    """One finished answer."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answer to a request without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Delta(TypedDict):
    """What is new in a choice; empty in its last chunk."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChunkChoice(TypedDict):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """One `data:` event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | UsageSoFar | None]


class ModelObject(TypedDict):
    """A model that can be asked for; both names of the context's length are in use elsewhere."""

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


class Error(TypedDict):
    """What went wrong; `param` names the field, if one is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is no success."""

    error: Error


class Health(TypedDict):
    """The body of a successful health check."""

    status: Literal["ok"]
