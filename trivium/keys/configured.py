"""What the settings of all stages say of keys, and what is opened by them.

A wrong setting ends the process with status 2.
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

# Of each setting, in all services that have it.
API_KEYS_FILE = (
    "File of the accepted API keys, by their SHA-256 digests: TOML with names, models, limits and "
    "expiry, or one digest (hex) per line, then an optional name; # starts a comment. Read again "
    "when it changes. Not set: no key is required."
)
STAGE_KEYS_FILE = (
    "File of API keys as in TRIVIUM_FACADE_API_KEYS_FILE, of which only those of stages are "
    "accepted here. Not set: no key is required."
)
LIMITS_URL = (
    "Redis or Valkey in which all processes share the counts for the limits of keys, such as "
    "redis://host:6379/0; needs trivium[redis]. Without it, and while it cannot be reached, each "
    "process counts on its own."
)
REFLECTION = "Serve gRPC reflection, which tools such as grpcurl use."


class DoorSettings(ServerTlsSettings):
    """Who gets in. The settings of each service extend these."""

    model_config = SettingsConfigDict(allow_inf_nan=False)

    api_keys_file: Path | None = Field(None, description=API_KEYS_FILE)
    allow_unauthenticated_remote: bool = Field(
        False,
        description="Listen on an address that other hosts can reach although neither API keys nor "
        "client certificates are required.",
    )

    @property
    def is_guarded(self) -> bool:
        """Whether calls are checked, or somebody said that they need not be."""
        return (
            self.api_keys_file is not None
            or self.authenticates_clients_by_tls
            or self.allow_unauthenticated_remote
        )


def open_keys(setting: str, path: Path | None) -> KeyFile | None:
    """The keys in the file that `setting` names, if it names one."""
    return _opened(setting, path, KeyFile)


def open_own_key(setting: str, path: Path | None) -> OwnKey | None:
    """The key in the file that `setting` names, if it names one."""
    return _opened(setting, path, OwnKey)


def _opened(setting: str, path: Path | None, kind: Callable[[Path], Opened]) -> Opened | None:
    if path is None:
        return None
    try:
        return kind(path)
    except ValueError as error:
        refuse_to_start(f"{setting}: {error}")


def open_limits(setting: str, url: str | None, registry: CollectorRegistry) -> RateLimits:
    """The limits of keys, shared at the URL that `setting` names; while an event loop runs."""
    shared: Accounts | None = None
    if url is not None:
        try:
            # Only here, as the library is an extra.
            from trivium.keys.shared_accounts import SharedAccounts

            shared = SharedAccounts(url)
        except ImportError:
            refuse_to_start(f"{setting}: install trivium[redis] for it")
        except ValueError as error:
            refuse_to_start(f"{setting}: {error}")
    return RateLimits(LimitMetrics(registry), shared)
