"""TLS between the local services, by their settings in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from trivium.wire.settings import load_settings
from trivium.wire.tls.channel import ChannelTls
from trivium.wire.tls.settings import TlsFile, TlsServerName, channel_tls

REST_CERTIFICATE = "TRIVIUM_FACADE_TLS_CERT_FILE"
REST_CLIENT_CA = "TRIVIUM_FACADE_TLS_CLIENT_CA_FILE"


class TlsMismatch(Exception):
    """Only one of a stage and its caller uses TLS; the message names the settings."""


@dataclass(frozen=True)
class StageTls:
    """`certificate` is the REST API's; `is_mutual` says whether its clients need one too. `chat` is
    for calls to the tokenizers, `generator` for calls to the generators."""

    certificate: str | None = None
    is_mutual: bool = False
    chat: ChannelTls | None = None
    generator: ChannelTls | None = None


class _Channel(BaseSettings):
    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True)

    tls_ca_file: TlsFile = None
    tls_cert_file: TlsFile = None
    tls_key_file: TlsFile = Field(None, validate_default=True)
    tls_server_name: TlsServerName = None


class _ToTokenizers(_Channel, env_prefix="TRIVIUM_FACADE_TOKENIZER_"):
    pass


class _ToGenerators(_Channel, env_prefix="TRIVIUM_TOKENIZER_GENERATOR_"):
    pass


def stage_tls() -> StageTls:
    """Reads the environment; raises TlsMismatch, and exits with 2 for an invalid setting."""
    return StageTls(
        os.environ.get(REST_CERTIFICATE) or None,
        bool(os.environ.get(REST_CLIENT_CA)),
        _channel(_ToTokenizers, "TRIVIUM_TOKENIZER_TLS_CERT_FILE"),
        _channel(_ToGenerators, "TRIVIUM_GENERATOR_TLS_CERT_FILE"),
    )


def _channel(kind: type[_Channel], servers: str) -> ChannelTls | None:
    found = load_settings(kind)
    callers = f"{kind.model_config['env_prefix']}TLS_CA_FILE"
    if bool(os.environ.get(servers)) != (found.tls_ca_file is not None):
        raise TlsMismatch(f"set both {servers} and {callers}, or neither")
    return channel_tls(
        found.tls_ca_file, found.tls_cert_file, found.tls_key_file, found.tls_server_name
    )
