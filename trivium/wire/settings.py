"""Settings are read once, at start; wrong ones are all listed at once, and the process exits 2."""

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
            print(f"{name}: {fault['msg']}", file=sys.stderr)
        refuse_to_start()


def refuse_to_start(message: str = "") -> NoReturn:
    """Ends the process with status 2: it was told something that it cannot do."""
    if message:
        print(message, file=sys.stderr)
    sys.exit(2)
