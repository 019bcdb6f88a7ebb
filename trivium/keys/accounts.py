"""Each API key's usage in this process: requests and tokens of the last minute, running requests,
and device time of the day.

Requests and tokens are leaky buckets that drain a minute's limit per minute; device time is counted
from midnight to midnight, UTC.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from trivium.keys.key_file import ApiKey

MINUTE = 60.0
DAY = 86_400.0
ROUNDING = 1e-6  # of a request: tolerance for rounding errors


@dataclass(frozen=True)
class LimitStatus:
    """A key's usage when a request arrives, before it is counted.

    `exceeded` is the limit that the key has reached, for which the request is rejected; else empty.
    """

    exceeded: str
    requests: float
    tokens: float
    device_nanoseconds: float
    seconds_to_midnight: float


class AccountsUnavailable(Exception):
    """The store of the accounts cannot be reached."""


class Accounts(Protocol):
    """Where the accounts are kept. Every method may raise AccountsUnavailable."""

    async def enter(self, key: ApiKey, request: str) -> LimitStatus:
        """Admits a request, with a unique id, unless the key has reached one of its limits."""

    async def leave(
        self, key: ApiKey, request: str, tokens: int, device_nanoseconds: float
    ) -> None:
        """Charges an admitted request that has ended."""

    async def close(self) -> None:
        """Stops background tasks and closes connections."""


@dataclass
class _Bucket:
    """A leaky bucket that drains at `limit` per minute."""

    amount: float = 0.0
    at: float = 0.0

    def add(self, amount: float, limit: int | None, now: float) -> float:
        """Adds `amount` at `now` and returns the level; always 0 without a limit."""
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
        """Resets the device time when a new day begins."""
        day = int(now // DAY)
        if self.day != day:
            self.day, self.device_nanoseconds = day, 0.0


class LocalAccounts:
    """Accounts in this process, by key name, so that they outlive a reload of the key file.

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

    async def enter(self, key: ApiKey, request: str) -> LimitStatus:
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
        exceeded = (name for name, (used, limit) in limits.items() if limit and used > limit)
        status = LimitStatus(
            next(exceeded, ""), requests, tokens, account.device_nanoseconds, DAY - today % DAY
        )
        if not status.exceeded:
            account.requests.add(1, key.requests_per_minute, now)
            account.running.add(request)
        return status

    async def leave(
        self, key: ApiKey, request: str, tokens: int, device_nanoseconds: float
    ) -> None:
        account = self._accounts.setdefault(key.name, _Account())
        account.running.discard(request)
        account.tokens.add(tokens, key.tokens_per_minute, self._clock())
        account.begin_day(self._wall_clock())
        account.device_nanoseconds += device_nanoseconds

    async def close(self) -> None:
        """Does nothing: there are no tasks or connections."""
