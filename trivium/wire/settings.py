"""Settings are read once, at start; wrong ones are all listed at once, and the process exits 2."""

import ipaddress
import sys
from typing import NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings

Settings = TypeVar("Settings", bound=BaseSettings)


def load_settings(cls: type[Settings]) -> Settings:
    """Reads `cls` from the environment, or prints every wrong variable and exits with 2."""
    try:
        return cls()
    except ValidationError as error:
        prefix = cls.model_config.get("env_prefix", "")
        for fault in error.errors():
            name = prefix + "_".join(str(part) for part in fault["loc"]).upper()
            # What our own checks say is put behind this.
            print(f"{name}: {fault['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        refuse_to_start()


def refuse_to_start(message: str = "") -> NoReturn:
    """Ends the process with status 2: it was told something that it cannot do."""
    if message:
        print(message, file=sys.stderr)
    sys.exit(2)


def refuse_unguarded(prefix: str, host: str, is_guarded: bool) -> None:
    """Refuses to start at an address that others can reach, unless their calls are checked or
    somebody said that they need not be. `prefix` is that of the settings' names."""
    if is_guarded or is_loopback(host):
        return
    refuse_to_start(
        f"{prefix}HOST: {host} can be reached from outside and no API keys are set. Set "
        f"{prefix}API_KEYS_FILE, {prefix}TLS_CLIENT_CA_FILE for mutual TLS, or "
        f"{prefix}ALLOW_UNAUTHENTICATED_REMOTE=true to serve everyone."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
