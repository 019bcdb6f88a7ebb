"""Requests for completions, before and after validation.

Plain values, except for SamplingParams, which is passed to the generator unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from trivium.sampling.v1.sampling_pb2 import SamplingParams


class Role(Enum):
    """The author of a message; the value is the role's name in chat templates."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


# Templates get developer messages as system messages.
SYSTEM_ROLES = (Role.SYSTEM, Role.DEVELOPER)


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant made earlier; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message. `role` is None if it is unknown; a part is None if it is not text."""

    role: Role | None
    parts: tuple[str | None, ...] = ()
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None

    @property
    def content(self) -> str | None:
        """The text, parts joined by newlines; None for JSON's null."""
        return "\n".join(part or "" for part in self.parts) if self.parts else None


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON text of a schema.

    `name` is None for a tool that is not a function. A `strict` schema is enforced exactly, others
    as far as possible.
    """

    name: str | None
    description: str | None = None
    parameters: str | None = None
    strict: bool = False


class ToolMode(Enum):
    """Whether tools may or must be called."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    FUNCTION = "function"


@dataclass(frozen=True)
class ToolChoice:
    """Which tools may or must be called; `mode` is None if it is unknown.

    `allowed` are the names of the functions that may be called; None means all.
    """

    mode: ToolMode | None
    function_name: str | None = None
    allowed: tuple[str, ...] | None = None


class ResponseKind(Enum):
    """What the answer's text has to be."""

    TEXT = "text"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class ResponseConstraint:
    """What the caller wants the answer's text to match, and the request's field that holds it.

    `definition` is a schema's JSON text, a pattern or a grammar. `kind` is None if it is unknown.
    Unsupported keywords of a `lenient` schema are ignored; other schemas are enforced exactly.
    """

    kind: ResponseKind | None
    param: str
    definition: str | None = None
    choices: tuple[str, ...] = ()
    name: str | None = None
    lenient: bool = False


@dataclass(frozen=True)
class Conversation:
    """The chat template's input. `variables` are its extra variables, as JSON text by name."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


@dataclass(frozen=True)
class RequestOptions:
    """The options that chat and plain completions share; None means absent."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    include_stop: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    response_format: ResponseConstraint | None = None
    structured_outputs: ResponseConstraint | None = None
    return_token_ids: bool = False
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion request as sent; None means absent."""

    model: str
    conversation: Conversation
    options: RequestOptions = RequestOptions()
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def schema_characters(self) -> int:
        """Number of characters of JSON to be parsed."""
        conversation, options = self.conversation, self.options
        constraints = filter(None, (options.response_format, options.structured_outputs))
        return (
            sum(len(tool.parameters or "") for tool in conversation.tools)
            + sum(len(constraint.definition or "") for constraint in constraints)
            + sum(map(len, conversation.variables.values()))
        )


@dataclass(frozen=True)
class CompletionRequest:
    """A plain completion request as sent. A prompt is text, token ids, or None.

    `add_special_tokens` adds what the tokenizer puts around a text, such as BOS.
    """

    model: str
    prompts: tuple[str | tuple[int, ...] | None, ...]
    options: RequestOptions = RequestOptions()
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


@dataclass(frozen=True)
class ValidOptions:
    """Validated options, which need no further checks. Created by `validate` only.

    `top_logprobs` is None for no log-probabilities at all, `prompt_logprobs` for none of the
    prompt's tokens, `echo_logprobs` for none of an echo's. `response_constraint` is None for plain
    text. `truncate_prompt_tokens` is -1 for as many as fit.
    """

    sampling: SamplingParams
    max_completion_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop: bool
    skip_special_tokens: bool
    n: int
    top_logprobs: int | None
    response_constraint: ResponseConstraint | None
    prompt_logprobs: int | None = None
    echo_logprobs: int | None = None
    return_token_ids: bool = False
    truncate_prompt_tokens: int | None = None
    bad_words: tuple[str, ...] = ()

    @property
    def prompt_alternatives(self) -> list[int]:
        """How many of the most likely tokens are shown at each position of the prompt, in each form
        in which its log-probabilities are requested."""
        return [k for k in (self.prompt_logprobs, self.echo_logprobs) if k is not None]


@dataclass(frozen=True)
class ToolUse:
    """Which tools an answer may or must call; without `tools`, none.

    `indices` are those of the tools in the request; `named` is whether the caller named the
    function to call, `restricted` whether it listed those that may be called.
    """

    tools: tuple[Tool, ...] = ()
    indices: tuple[int, ...] = ()
    forced: bool = False
    parallel: bool = True
    named: bool = False
    restricted: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools if tool.name is not None)


@dataclass(frozen=True)
class ValidRequest:
    """A validated chat request. Created by `validate` only."""

    conversation: Conversation
    options: ValidOptions
    tool_use: ToolUse
