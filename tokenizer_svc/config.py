"""The settings of the tokenizer stage, from environment variables that begin TRIVIUM_TOKENIZER_."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import NoDecode, SettingsConfigDict

from tokenizer_svc.families.choose import REASONING_PARSERS, TOOL_PARSERS
from trivium.keys.settings import LIMITS_URL, REFLECTION, AccessSettings
from trivium.wire.listening import Host
from trivium.wire.replicas.resolver import check_target
from trivium.wire.serving import MAX_CONNECTION_AGE_SECONDS
from trivium.wire.tls import settings as tls
from trivium.wire.tls.channel import ChannelTls

Target = Annotated[str, AfterValidator(check_target)]

DEFAULT_TARGET = "127.0.0.1:50052"


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ValueError(f"should be a JSON list of objects: {error}") from None
    if not isinstance(found, list):
        raise ValueError("should be a JSON list of objects")
    return found


class ModelSettings(BaseModel):
    """One entry of MODELS; parsers and `default_max_tokens` default to the general settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_directory: Path
    generator_target: Target = DEFAULT_TARGET
    aliases: tuple[str, ...] = ()
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    default_max_tokens: Annotated[int, Field(ge=1)] | None = None

    @field_validator("tool_parser")
    @classmethod
    def _known_tool_parser(cls, value: str | None) -> str | None:
        return _one_of(TOOL_PARSERS, value)

    @field_validator("reasoning_parser")
    @classmethod
    def _known_reasoning_parser(cls, value: str | None) -> str | None:
        return _one_of(REASONING_PARSERS, value)


def _one_of(known: tuple[str, ...], value: str | None) -> str | None:
    if value is not None and value not in known:
        raise ValueError(f"should be one of {', '.join(known)}")
    return value


class TokenizerSettings(AccessSettings):
    """Read once at start, never changed."""

    model_config = SettingsConfigDict(
        env_prefix="TRIVIUM_TOKENIZER_",
        env_ignore_empty=True,
        frozen=True,
        protected_namespaces=(),
    )

    host: Host = Field("127.0.0.1", description="Address to listen on, for gRPC and metrics.")
    port: int = Field(
        50051, ge=0, le=65535, description="Port of the gRPC server; 0 picks a free one."
    )
    metrics_port: int = Field(
        9051,
        ge=0,
        le=65535,
        description="Port of the HTTP server with /metrics, /healthz and /livez, never over TLS; 0 "
        "turns it off.",
    )
    generator_target: Target = Field(
        DEFAULT_TARGET,
        description="The generators: host:port, dns:///host:port, or several of these separated by "
        "commas. Each address of each name is a replica; names are looked up every second.",
    )
    generator_tls_ca_file: tls.TlsFile = Field(None, description=tls.CA_FILE)
    generator_tls_cert_file: tls.TlsFile = Field(None, description=tls.CERT_FILE)
    generator_tls_key_file: tls.TlsFile = Field(
        None, validate_default=True, description=tls.KEY_FILE
    )
    generator_tls_server_name: tls.TlsServerName = Field(None, description=tls.SERVER_NAME)
    generator_api_key_file: Path | None = Field(
        None,
        description="File with this stage's API key for the generators, if they require one. "
        "Reloaded when it changes.",
    )
    limits_url: str | None = Field(None, description=LIMITS_URL)
    reflection: bool = Field(True, description=REFLECTION)
    models: Annotated[tuple[ModelSettings, ...], NoDecode, BeforeValidator(_from_json)] = Field(
        (),
        description=(
            "Several models instead of the one in MODEL_DIRECTORY: a JSON list of objects with "
            "model_directory (required), generator_target, aliases, tool_parser, "
            "reasoning_parser and default_max_tokens."
        ),
    )
    model_directory: Path | None = Field(
        None,
        validate_default=True,
        description="The model's folder; its name is the model's id. Required without MODELS.",
    )
    tool_parser: Literal["auto", "none", "hermes", "llama3_json", "mistral", "harmony"] = Field(
        "auto",
        description="The format of tool calls; auto detects it from the chat template, and with "
        "none calls are text.",
    )
    reasoning_parser: Literal["auto", "none", "deepseek_r1", "qwen3", "harmony"] = Field(
        "auto", description="The format of reasoning; auto detects it from the chat template."
    )
    chat_template_kwargs: str = Field(
        "enable_thinking,thinking,reasoning_effort",
        description="Variables that chat_template_kwargs may set, separated by commas.",
    )
    default_max_tokens: int | None = Field(
        None,
        ge=1,
        description=(
            "Maximum output tokens of a chat that sets neither max_completion_tokens nor "
            "max_tokens. Not set: up to the end of the context."
        ),
    )
    fold_messages: bool = Field(
        True,
        description=(
            "Rewrite a conversation that the chat template refuses or shows only in part: "
            "merge later (or all) system messages into the adjacent user message, and adjacent "
            "messages of one role into one. If false, it is refused with 400 "
            "invalid_chat_template_input."
        ),
    )
    max_connection_age_seconds: float = Field(
        MAX_CONNECTION_AGE_SECONDS,
        ge=1,
        le=86_400,
        description="Seconds after which a connection is closed and the client has to reconnect. "
        "gRPC clients then resolve the tokenizers' name again and load balancers pick again, so "
        "that new replicas get their share of calls within this time. The facade does not "
        "depend on it.",
    )
    drain_notice_seconds: float = Field(
        5.0,
        ge=0,
        description="Seconds after a stop signal in which health checks fail, but calls are still "
        "accepted.",
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="Seconds after that in which calls in flight may finish; the rest are aborted.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of log lines."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="json: one JSON object per line; text: human-readable."
    )
    log_name: str = Field("tokenizer_svc", description="Name of this process in its log lines.")

    @field_validator("model_directory")
    @classmethod
    def _model_directory_or_models(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        models = info.data.get("models")  # None if MODELS itself is invalid
        if value is None and models == ():
            raise ValueError("required unless MODELS is set")
        if value is not None and models:
            raise ValueError("cannot be combined with MODELS")
        return value

    @property
    def served(self) -> tuple[ModelSettings, ...]:
        """All served models, from MODELS or MODEL_DIRECTORY."""
        if self.model_directory is None:
            return self.models
        one = ModelSettings(
            model_directory=self.model_directory, generator_target=self.generator_target
        )
        return (one,)

    def generator_tls(self) -> ChannelTls | None:
        """TLS for the channels to the generators; raises TlsError."""
        return tls.channel_tls(
            self.generator_tls_ca_file,
            self.generator_tls_cert_file,
            self.generator_tls_key_file,
            self.generator_tls_server_name,
        )

    @property
    def template_variables(self) -> frozenset[str]:
        """Names of template variables that requests may set."""
        names = (name.strip() for name in self.chat_template_kwargs.split(","))
        return frozenset(name for name in names if name)
