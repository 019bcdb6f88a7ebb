"""The bodies of /tokenize, /detokenize and /tokenizer_info, which are vLLM's endpoints."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from rest_facade.requests.field import AnyText, Body
from rest_facade.requests.message import Messages, check_messages
from rest_facade.requests.options import TokenId
from rest_facade.requests.tool import Tools, check_tools
from rest_facade.requests.unsupported import refuse_unsupported_tokenize
from trivium.field_errors import contradiction, missing
from trivium.limits import MAX_TOKEN_IDS

_MODEL = "The model's id. Default: the one model, if there is only one."


class TokenizeRequest(Body):
    """The body of POST /tokenize: a prompt, or the messages of a conversation."""

    model: str | None = Field(None, description=_MODEL)
    prompt: str | None = Field(None, description="Text, in which control tokens are recognized.")
    return_token_strs: bool | None = Field(
        None, description="Whether the answer has the tokens as strings too. Default false."
    )
    messages: Messages | None = Field(
        None, description="A conversation, which the chat template renders first."
    )
    add_special_tokens: bool | None = Field(
        None, description="With prompt: add special tokens such as BOS. Default true."
    )
    add_generation_prompt: bool | None = Field(
        None, description="With messages: open the assistant's message. Default true."
    )
    continue_final_message: bool | None = Field(
        None, description="With messages: continue the last one. Default false."
    )
    tools: Tools | None = Field(
        None, description="With messages: functions that the model may call."
    )
    chat_template_kwargs: dict[str, AnyText] | None = Field(
        None, description="With messages: further variables for the chat template."
    )

    def check(self, raw: Mapping[str, Any]) -> None:
        refuse_unsupported_tokenize(raw)
        if self.prompt is None and self.messages is None:
            raise missing("prompt")
        if self.prompt is None:
            self._check_conversation()
            return
        for name in (
            "messages",
            "add_generation_prompt",
            "continue_final_message",
            "tools",
            "chat_template_kwargs",
        ):
            if getattr(self, name):
                raise contradiction(name, "cannot be combined with 'prompt'.")

    def _check_conversation(self) -> None:
        check_messages(self.messages or [])
        check_tools(self.tools or [], None)
        if self.add_special_tokens:
            raise contradiction("add_special_tokens", "is only allowed with 'prompt'.")
        if self.continue_final_message and self.add_generation_prompt:
            raise contradiction(
                "add_generation_prompt", "cannot be true with 'continue_final_message'."
            )


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str | None = Field(None, description=_MODEL)
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)] = Field(
        description="Token ids."
    )


class TokenizerInfoRequest(Body):
    """The body of POST /tokenizer_info."""

    model: str | None = Field(None, description=_MODEL)
