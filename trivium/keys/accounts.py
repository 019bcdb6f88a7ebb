"""What each API key has taken, in this process: requests and tokens of the last minute, requests
that run, device time of the day.

Requests and tokens leak away evenly, a minute's worth in a minute; device time counts from one
midnight, UTC, to the next.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from trivium.keys.key_file import ApiKey

MINUTE = 60.0
DAY = 86_400.0
ROUNDING = 1e-6  # of a request


@dataclass(frozen=True)
class Standing:
    """What a key has taken when a request asks to be let in. It is, unless it is `over` a limit."""

    over: str
    requests: float
    tokens: float
    device_nanoseconds: float
    seconds_to_midnight: float


class AccountsUnavailable(Exception):
    """The accounts cannot be reached."""


class Accounts(Protocol):
    """Where the accounts are kept. Each raises AccountsUnavailable."""

    async def enter(self, key: ApiKey, request: str) -> Standing:
        """Lets a request in, by an id of its own, unless the key is over one of its limits."""

    async def leave(
        self, key: ApiKey, request: str, tokens: int, device_nanoseconds: float
    ) -> None:
        """A request that was let in has ended, and has taken this."""

    async def close(self) -> None:
        """Ends whatever runs."""


@dataclass
class _Bucket:
    """A leaky bucket, which `limit` a minute flow out of."""

    amount: float = 0.0
    at: float = 0.0

    def add(self, amount: float, limit: int | None, now: float) -> float:
        """What is in it at `now`, with as much more; nothing is kept without a limit."""
        if limit is None:
            self.amount = 0.0
        else:
            self.amount = max(self.amount - (now - self.at) * limit / MINUTE, 0.0) + amount
        self.at = now
        return self.amount


@dataclass
class _Account:
    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)
    running: set[str] = field(default_factory=set)
    day: int = 0
    device_nanoseconds: float = 0.0

    def begin_day(self, now: float) -> None:
        """Forgets yesterday's device time."""
        day = int(now // DAY)
        if self.day != day:
            self.day, self.device_nanoseconds = day, 0.0


class LocalAccounts:
    """Accounts of this process, by the keys' names: they outlive a reload of the key file.

    `clock` is monotonic, `wall_clock` in seconds since 1970.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._accounts: dict[str, _Account] = {}

    async def enter(self, key: ApiKey, request: str) -> Standing:
        account = self._accounts.setdefault(key.name, _Account())
        now, today = self._clock(), self._wall_clock()
        account.begin_day(today)
        requests = account.requests.add(0, key.requests_per_minute, now)
        tokens = account.tokens.add(0, key.tokens_per_minute, now)
        limits = {
            "requests": (requests + 1 - ROUNDING, key.requests_per_minute),
            "tokens": (tokens + 1 - ROUNDING, key.tokens_per_minute),
            "concurrent_requests": (len(account.running) + 1, key.concurrent_requests),
            "gpu_seconds": (account.device_nanoseconds / 1e9 + 1e-9, key.gpu_seconds_per_day),
        }
        over = (name for name, (wanted, most) in limits.items() if most and wanted > most)
        standing = Standing(
            next(over, ""), requests, tokens, account.device_nanoseconds, DAY - today % DAY
        )
        if not standing.over:
            account.requests.add(1, key.requests_per_minute, now)
            account.running.add(request)
        return standing

    async def leave(
        self, key: ApiKey, request: str, tokens: int, device_nanoseconds: float
    ) -> None:
        account = self._accounts.setdefault(key.name, _Account())
        account.running.discard(request)
        account.tokens.add(tokens, key.tokens_per_minute, self._clock())
        account.begin_day(self._wall_clock())
        account.device_nanoseconds += device_nanoseconds

    async def close(self) -> None:
        """There is nothing to end."""
