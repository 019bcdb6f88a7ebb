"""Settings of the REST facade: read once, frozen. No other module reads the environment."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from trivium.keys.settings import LIMITS_URL, AccessSettings
from trivium.usage_log import USAGE_LOG, USAGE_LOG_BACKUPS, USAGE_LOG_MAX_BYTES
from trivium.wire.listening import Host
from trivium.wire.replicas.resolver import check_target
from trivium.wire.tls import settings as tls
from trivium.wire.tls.channel import ChannelTls

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")


def _parts(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


class FacadeSettings(AccessSettings):
    """The facade's listener, limits and backends."""

    model_config = SettingsConfigDict(
        env_prefix="TRIVIUM_FACADE_", env_ignore_empty=True, frozen=True
    )

    host: Host = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    reuse_port: bool = Field(
        False,
        description="Share the port with other facades on this machine (SO_REUSEPORT), over which "
        "Linux spreads new connections evenly. Requires METRICS_PORT.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        validate_default=True,
        description="Port of a separate HTTP server with /metrics (then no longer on PORT), "
        "/healthz and /livez, never over TLS; 0: metrics are on PORT.",
    )
    tokenizer_target: Annotated[str, AfterValidator(check_target)] = Field(
        "127.0.0.1:50051",
        description="The tokenizers: host:port, dns:///host:port, or several of these separated by "
        "commas. Each address of each name is a replica; names are looked up every second.",
    )
    tokenizer_tls_ca_file: tls.TlsFile = Field(None, description=tls.CA_FILE)
    tokenizer_tls_cert_file: tls.TlsFile = Field(None, description=tls.CERT_FILE)
    tokenizer_tls_key_file: tls.TlsFile = Field(
        None, validate_default=True, description=tls.KEY_FILE
    )
    tokenizer_tls_server_name: tls.TlsServerName = Field(None, description=tls.SERVER_NAME)
    tokenizer_api_key_file: Path | None = Field(
        None,
        description="File with this stage's API key for the tokenizers, if they require one. "
        "Reloaded when it changes.",
    )
    limits_url: str | None = Field(None, description=LIMITS_URL)
    cors_origins: str | None = Field(
        None,
        description="CORS: origins whose pages may call this server from a browser, separated by "
        "commas (`https://chat.example.org,http://localhost:3000`); `*` allows all. Not set: none.",
    )
    chat_page: bool = Field(
        True,
        description="Serve a chat page at /; if false, / is 404. The page itself needs no key, and "
        "asks for one if the API requires it.",
    )
    docs: bool = Field(True, description="Serve the API's documentation: /docs, /openapi.json.")
    metrics: bool = Field(True, description="Serve /metrics, if METRICS_PORT is 0.")
    max_body_bytes: int = Field(
        8 * 2**20,
        ge=1024,
        le=31 * 2**20,
        description="Maximum size of a request body in bytes. Parsing one "
        "delays running streams by about 5 ms per MiB.",
    )
    body_read_seconds: float = Field(
        30.0, gt=0, le=3600, description="Seconds within which a request body must arrive."
    )
    request_timeout_seconds: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="Maximum seconds for a whole completion; then 504. Not set: no limit.",
    )
    keep_alive_seconds: float = Field(
        15.0,
        gt=0,
        le=3600,
        description="Seconds of silence in a stream after which a keep-alive comment is sent. A "
        "request that fails before the first one gets an HTTP error status, later an error event.",
    )
    idle_connection_seconds: int = Field(
        75,
        ge=1,
        le=3600,
        description="Seconds for which an idle connection is kept open, and within which the head "
        "of a request has to arrive and, on Linux, a client has to read some more of its answer. "
        "Clients and proxies should close idle ones earlier (nginx: 60), so that no request is "
        "sent on a connection that is being closed.",
    )
    health_timeout_seconds: float = Field(
        1.0, gt=0, le=60, description="Seconds /health waits for the tokenizer's answer."
    )
    drain_notice_seconds: float = Field(
        5.0,
        ge=0,
        le=600,
        description="Seconds after a stop signal in which /health fails, but requests are still "
        "accepted.",
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="Seconds after that in which requests in flight may finish; the rest are "
        "aborted.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of log lines."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="json: one JSON object per line; text: human-readable."
    )
    log_name: str = Field("rest_facade", description="Name of this process in its log lines.")
    usage_log: str | None = Field(None, description=USAGE_LOG)
    usage_log_max_bytes: int = Field(100 * 2**20, ge=2**20, description=USAGE_LOG_MAX_BYTES)
    usage_log_backups: int = Field(20, ge=1, le=10_000, description=USAGE_LOG_BACKUPS)

    @field_validator("cors_origins")
    @classmethod
    def _valid_origins(cls, value: str | None) -> str | None:
        for origin in _parts(value or ""):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin: expected one such as https://chat.example.org, "
                    "with no path and no slash at its end, or *"
                )
        return value

    @field_validator("reuse_port")
    @classmethod
    def _requires_linux(cls, value: bool) -> bool:
        if value and sys.platform != "linux":
            raise ValueError("only on Linux: elsewhere one process would get all connections")
        return value

    @field_validator("metrics_port")
    @classmethod
    def _required_with_reuse_port(cls, value: int, others: ValidationInfo) -> int:
        if others.data.get("reuse_port") and not value:
            raise ValueError(
                "required with REUSE_PORT: on a shared port, any process may answer /metrics"
            )
        return value

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """Origins whose pages may call this server."""
        return tuple(_parts(self.cors_origins or ""))

    def tokenizer_tls(self) -> ChannelTls | None:
        """TLS for the channels to the tokenizers; raises TlsError."""
        return tls.channel_tls(
            self.tokenizer_tls_ca_file,
            self.tokenizer_tls_cert_file,
            self.tokenizer_tls_key_file,
            self.tokenizer_tls_server_name,
        )
