"""The settings for API keys, TLS and access, which all stages share, and what they open.

An invalid setting ends the process with status 2.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from trivium.keys.accounts import Accounts
from trivium.keys.key_file import KeyFile
from trivium.keys.own_key import OwnKey
from trivium.keys.rate_limits import LimitMetrics, RateLimits
from trivium.wire.settings import refuse_to_start
from trivium.wire.tls.settings import ServerTlsSettings

Opened = TypeVar("Opened")

# Descriptions of the settings, for all services that have them.
API_KEYS_FILE = (
    "File of accepted API keys, as SHA-256 digests: TOML with names, models, limits and "
    "expiry, or one hex digest per line, optionally followed by a name; # starts a comment. "
    "Reloaded when it changes. Not set: no key is required."
)
STAGE_KEYS_FILE = (
    "File of API keys, as TRIVIUM_FACADE_API_KEYS_FILE; only stage keys are accepted here. "
    "Not set: no key is required."
)
LIMITS_URL = (
    "URL of a Redis or Valkey server that counts towards the limits of API keys for all "
    "processes, such as redis://host:6379/0; requires trivium[redis]. If not set or "
    "unreachable, each process counts on its own."
)
REFLECTION = "Enable gRPC reflection, for tools such as grpcurl."


class AccessSettings(ServerTlsSettings):
    """Who may call. The settings of each service extend these."""

    model_config = SettingsConfigDict(allow_inf_nan=False)

    api_keys_file: Path | None = Field(None, description=API_KEYS_FILE)
    allow_unauthenticated_remote: bool = Field(
        False,
        description="Allow listening on an address that other hosts can reach even though "
        "neither API keys nor client certificates are required.",
    )

    @property
    def is_guarded(self) -> bool:
        """Whether calls are authenticated, or explicitly need not be."""
        return (
            self.api_keys_file is not None
            or self.authenticates_clients_by_tls
            or self.allow_unauthenticated_remote
        )


def open_keys(setting: str, path: Path | None) -> KeyFile | None:
    """The keys in the file at `path`, the value of `setting`; None if not set."""
    return _opened(setting, path, KeyFile)


def open_own_key(setting: str, path: Path | None) -> OwnKey | None:
    """The key in the file at `path`, the value of `setting`; None if not set."""
    return _opened(setting, path, OwnKey)


def _opened(setting: str, path: Path | None, kind: Callable[[Path], Opened]) -> Opened | None:
    if path is None:
        return None
    try:
        return kind(path)
    except ValueError as error:
        refuse_to_start(f"{setting}: {error}")


def open_limits(setting: str, url: str | None, registry: CollectorRegistry) -> RateLimits:
    """The limits of keys, shared through `url`, the value of `setting`, if set.

    Must be called while the event loop runs.
    """
    shared: Accounts | None = None
    if url is not None:
        try:
            # Imported here, as the library is an optional extra.
            from trivium.keys.shared_accounts import SharedAccounts

            shared = SharedAccounts(url)
        except ImportError:
            refuse_to_start(f"{setting}: requires trivium[redis]")
        except ValueError as error:
            refuse_to_start(f"{setting}: {error}")
    return RateLimits(LimitMetrics(registry), shared)
