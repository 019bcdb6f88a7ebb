"""Converts requests from protobuf without validating them."""

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import Message as ProtobufMessage

from tokenizer_svc.request.types import (
    ChatRequest,
    CompletionRequest,
    Conversation,
    Message,
    RequestOptions,
    ResponseConstraint,
    ResponseKind,
    Role,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from trivium.chat.v1 import chat_pb2, completion_pb2
from trivium.tokenizer.v1 import tokenizer_pb2

Value = TypeVar("Value")

_ROLES = {
    chat_pb2.ROLE_SYSTEM: Role.SYSTEM,
    chat_pb2.ROLE_DEVELOPER: Role.DEVELOPER,
    chat_pb2.ROLE_USER: Role.USER,
    chat_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
    chat_pb2.ROLE_TOOL: Role.TOOL,
}
_MODES = {
    chat_pb2.TOOL_CHOICE_MODE_UNSPECIFIED: ToolMode.AUTO,
    chat_pb2.TOOL_CHOICE_MODE_NONE: ToolMode.NONE,
    chat_pb2.TOOL_CHOICE_MODE_AUTO: ToolMode.AUTO,
    chat_pb2.TOOL_CHOICE_MODE_REQUIRED: ToolMode.REQUIRED,
    chat_pb2.TOOL_CHOICE_MODE_FUNCTION: ToolMode.FUNCTION,
}
_STRUCTURED_KINDS = {
    "json": ResponseKind.JSON_SCHEMA,
    "regex": ResponseKind.REGEX,
    "grammar": ResponseKind.GRAMMAR,
    "choice": ResponseKind.CHOICE,
    "json_object": ResponseKind.JSON_OBJECT,
}


def chat_request(request: chat_pb2.CreateChatCompletionRequest) -> ChatRequest:
    """The request as sent; absent fields are None."""
    return ChatRequest(
        model=request.model,
        conversation=Conversation(
            messages=_messages(request.messages),
            tools=_tools(request.tools),
            variables=dict(request.chat_template_kwargs),
            reasoning_effort=_optional(request, "reasoning_effort", str),
            add_generation_prompt=_optional(request, "add_generation_prompt", bool),
            continue_final_message=request.continue_final_message,
        ),
        options=_options(request.options),
        logprobs=_optional(request, "logprobs", bool),
        top_logprobs=_optional(request, "top_logprobs", int),
        tool_choice=(
            _tool_choice(request.tool_choice) if request.HasField("tool_choice") else None
        ),
        parallel_tool_calls=_optional(request, "parallel_tool_calls", bool),
    )


def render_request(request: tokenizer_pb2.RenderChatRequest) -> Conversation:
    """The conversation to render."""
    return Conversation(
        messages=_messages(request.messages),
        tools=_tools(request.tools),
        variables=dict(request.chat_template_kwargs),
        add_generation_prompt=_optional(request, "add_generation_prompt", bool),
        continue_final_message=request.continue_final_message,
    )


def completion_request(request: completion_pb2.CreateCompletionRequest) -> CompletionRequest:
    """The request as sent; absent fields are None."""
    return CompletionRequest(
        model=request.model,
        prompts=tuple(_prompt(prompt) for prompt in request.prompts),
        options=_options(request.options),
        echo=request.echo,
        logprobs=_optional(request, "logprobs", int),
        add_special_tokens=_optional(request, "add_special_tokens", bool) is not False,
    )


def _prompt(prompt: completion_pb2.Prompt) -> str | tuple[int, ...] | None:
    if prompt.HasField("text"):
        return str(prompt.text)
    return tuple(prompt.token_ids.ids) if prompt.HasField("token_ids") else None


def _options(request: chat_pb2.CompletionOptions) -> RequestOptions:
    return RequestOptions(
        sampling=request.sampling,
        max_completion_tokens=_optional(request, "max_completion_tokens", int),
        min_tokens=_optional(request, "min_tokens", int),
        ignore_eos=_optional(request, "ignore_eos", bool),
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        bad_words=tuple(request.bad_words),
        include_stop=_optional(request, "include_stop_str_in_output", bool),
        skip_special_tokens=_optional(request, "skip_special_tokens", bool),
        n=_optional(request, "n", int),
        response_format=(
            _response_format(request.response_format)
            if request.HasField("response_format")
            else None
        ),
        structured_outputs=(
            _structured_outputs(request.structured_outputs)
            if request.HasField("structured_outputs")
            else None
        ),
        return_token_ids=request.return_token_ids,
        truncate_prompt_tokens=_optional(request, "truncate_prompt_tokens", int),
        prompt_logprobs=_optional(request, "prompt_logprobs", int),
    )


def _response_format(response_format: chat_pb2.ResponseFormat) -> ResponseConstraint:
    kind = response_format.WhichOneof("format")
    if kind == "json_schema":
        schema = response_format.json_schema
        return ResponseConstraint(
            ResponseKind.JSON_SCHEMA,
            "response_format.json_schema.schema",
            definition=_optional(schema, "schema", str),
            name=schema.name,
            lenient=not schema.strict,
        )
    return ResponseConstraint(ResponseKind(kind) if kind else None, "response_format")


def _structured_outputs(structured: chat_pb2.StructuredOutputs) -> ResponseConstraint | None:
    kind = structured.WhichOneof("constraint")
    if kind is None:
        return ResponseConstraint(None, "structured_outputs")
    if kind == "json_object" and not structured.json_object:
        return None
    value = getattr(structured, kind)
    return ResponseConstraint(
        _STRUCTURED_KINDS[kind],
        f"structured_outputs.{kind}",
        definition=value if isinstance(value, str) else None,
        choices=tuple(structured.choice.choices),
    )


def _messages(messages: Iterable[chat_pb2.ChatMessage]) -> tuple[Message, ...]:
    """The conversation; unknown roles and parts become None."""
    return tuple(
        Message(
            role=_ROLES.get(message.role),
            parts=tuple(part.text if part.HasField("text") else None for part in message.content),
            name=_optional(message, "name", str),
            tool_calls=tuple(
                ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls
            ),
            tool_call_id=_optional(message, "tool_call_id", str),
            reasoning=_optional(message, "reasoning_content", str),
        )
        for message in messages
    )


def _tools(tools: Iterable[chat_pb2.Tool]) -> tuple[Tool, ...]:
    return tuple(
        Tool(
            name=tool.function.name if tool.HasField("function") else None,
            description=_optional(tool.function, "description", str),
            parameters=_optional(tool.function, "parameters", str),
            strict=tool.function.strict,
        )
        for tool in tools
    )


def _tool_choice(choice: chat_pb2.ToolChoice) -> ToolChoice:
    has_allowed = choice.HasField("allowed_tools")
    return ToolChoice(
        mode=_MODES.get(choice.mode),
        function_name=_optional(choice, "function_name", str),
        allowed=tuple(choice.allowed_tools.function_names) if has_allowed else None,
    )


def _optional(message: ProtobufMessage, name: str, kind: type[Value]) -> Value | None:
    """A field's value, which is of type `kind`; None if the field is absent."""
    if not message.HasField(name):
        return None
    value = getattr(message, name)
    assert isinstance(value, kind), f"{name} is not a {kind}. This is a bug."
    return value
