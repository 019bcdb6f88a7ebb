"""The settings of the tokenizer stage, from environment variables that begin TRIVIUM_TOKENIZER_."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TokenizerSettings(BaseSettings):
    """Read once at start, never changed."""

    model_config = SettingsConfigDict(
        env_prefix="TRIVIUM_TOKENIZER_", frozen=True, protected_namespaces=()
    )

    host: str = Field("127.0.0.1", description="Address to listen on, for gRPC and metrics.")
    port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC server; 0 for any.")
    metrics_port: int = Field(
        9051, ge=0, le=65535, description="Port of the HTTP server with /metrics; 0 turns it off."
    )
    generator_target: str = Field(
        "127.0.0.1:50052",
        min_length=1,
        description="The generator: host:port, or a gRPC name such as dns:///host:port.",
    )
    model_directory: Path = Field(description="The model's folder; its name is the model's id.")
    drain_notice_seconds: float = Field(
        0.5,
        ge=0,
        allow_inf_nan=False,
        description="How long to wait at the end, not ready, before new calls are refused.",
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="How long running calls may go on at the end.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least severe messages that are logged."
    )
