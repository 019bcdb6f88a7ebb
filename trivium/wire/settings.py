"""Settings are read once, at start; all invalid ones are listed, and the process exits with 2."""

import ipaddress
import sys
from typing import NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings

Settings = TypeVar("Settings", bound=BaseSettings)


def load_settings(cls: type[Settings]) -> Settings:
    """Reads `cls` from the environment, or prints every invalid variable and exits with 2."""
    try:
        return cls()
    except ValidationError as error:
        prefix = cls.model_config.get("env_prefix", "")
        for fault in error.errors():
            name = prefix + "_".join(str(part) for part in fault["loc"]).upper()
            # pydantic puts this prefix before the messages of our own validators.
            print(f"{name}: {fault['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        refuse_to_start()


def refuse_to_start(message: str = "") -> NoReturn:
    """Exits with status 2, for invalid settings."""
    if message:
        print(message, file=sys.stderr)
    sys.exit(2)


def refuse_unguarded(prefix: str, host: str, is_guarded: bool) -> None:
    """Refuses to start at an address that other machines can reach, unless calls are authenticated
    or explicitly need not be. `prefix` is that of the settings' names."""
    if is_guarded or is_loopback(host):
        return
    refuse_to_start(
        f"{prefix}HOST: {host} can be reached by other hosts, but neither API keys nor client "
        f"certificates are required. Set {prefix}API_KEYS_FILE, {prefix}TLS_CLIENT_CA_FILE "
        f"(mutual TLS), or {prefix}ALLOW_UNAUTHENTICATED_REMOTE=true to allow calls without "
        "authentication."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
