"""How long the local services may take to stop, by their settings in the environment."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from trivium.cli.pipeline import DRAIN_NOTICE_SECONDS, DRAIN_SECONDS
from trivium.wire.settings import load_settings


class _Drain(BaseSettings):
    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True)

    drain_notice_seconds: float = Field(DRAIN_NOTICE_SECONDS, ge=0, allow_inf_nan=False)
    drain_seconds: float = Field(DRAIN_SECONDS, ge=0, allow_inf_nan=False)


class _Facade(_Drain, env_prefix="TRIVIUM_FACADE_"):
    pass


class _Tokenizer(_Drain, env_prefix="TRIVIUM_TOKENIZER_"):
    pass


class _Generator(_Drain, env_prefix="TRIVIUM_GENERATOR_"):
    pass


def longest_drain(given: float | None) -> float:
    """Seconds until every service has stopped by itself, with the `given` drain time or its own
    setting; exits with 2 for an invalid setting."""
    drains = [load_settings(kind) for kind in (_Facade, _Tokenizer, _Generator)]
    return max(
        drain.drain_notice_seconds + (drain.drain_seconds if given is None else given)
        for drain in drains
    )
