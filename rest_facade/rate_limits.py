"""What each API key may take: requests and tokens per minute, requests at once, device time a day.

Requests and tokens come back evenly, a minute's worth in a minute; device time comes back at
midnight, UTC. A request is admitted while something is left of each, and takes what it took when it
ends: tokens and device time may be overdrawn once, and are then paid back before the next request.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter

from rest_facade.auth import ApiKey
from rest_facade.usage import RequestUsage
from trivium.wire.errors import ServiceError

_MINUTE = 60.0
_DAY = 86_400.0
_ROUNDING = 1e-6  # of a request


class LimitMetrics:
    """What each key asked for, by the names of the key file."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "trivium_key_requests",
            "Completions that a key asked for, those over a limit included",
            ["key"],
            registry=registry,
        )
        self.rejections = Counter(
            "trivium_key_rejections",
            "Requests over a limit of their key: requests, tokens, concurrent_requests, "
            "gpu_seconds",
            ["key", "limit"],
            registry=registry,
        )


@dataclass
class _Bucket:
    """What was taken in the last minute: a leaky bucket, which `limit` a minute flow out of."""

    amount: float = 0.0
    at: float = 0.0

    def add(self, amount: float, limit: int | None, now: float) -> float:
        """What is in it at `now`, with as much more; nothing is kept without a limit."""
        if limit is None:
            self.amount = 0.0
        else:
            self.amount = max(self.amount - (now - self.at) * limit / _MINUTE, 0.0) + amount
        self.at = now
        return self.amount


@dataclass
class _Account:
    """What a key has taken."""

    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)
    running: int = 0
    day: int = 0
    device_nanoseconds: float = 0.0


class RateLimits:
    """The accounts of all keys, by name, in this process. They outlive a reload of the key file.

    `clock` is monotonic, `wall_clock` in seconds since 1970.
    """

    def __init__(
        self,
        metrics: LimitMetrics,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._accounts: dict[str, _Account] = {}
        # Of all requests that ended well: what one that broke off is reckoned by.
        self._tokens = 0
        self._device_nanoseconds = 0

    @contextlib.contextmanager
    def admitted(self, key: ApiKey, usage: RequestUsage) -> Iterator[None]:
        """Around a request of this key; raises ServiceError if it is over a limit.

        Sets the headers of its answer, and takes what `usage` says in the end.
        """
        account = self._accounts.setdefault(key.name, _Account())
        self._metrics.requests.labels(key.name).inc()
        try:
            self._check(key, account)
            account.requests.add(1, key.requests_per_minute, self._clock())
        finally:
            usage.headers = self._headers(key, account)
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1
            self._settle(key, account, *usage.taken())

    def _check(self, key: ApiKey, account: _Account) -> None:
        buckets = {
            "requests": (key.requests_per_minute, account.requests),
            "tokens": (key.tokens_per_minute, account.tokens),
        }
        for name, (limit, bucket) in buckets.items():
            if limit is not None:
                over = bucket.add(0, limit, self._clock()) + 1 - limit
                if over > _ROUNDING:
                    seconds = over * _MINUTE / limit
                    raise self._refusal(key, name, limit, "per minute", seconds)
        if key.concurrent_requests is not None and account.running >= key.concurrent_requests:
            raise self._refusal(key, "concurrent_requests", key.concurrent_requests, "at once", 1)
        if key.gpu_seconds_per_day is not None:
            today = self._wall_clock()
            self._begin_day(account, today)
            if account.device_nanoseconds >= key.gpu_seconds_per_day * 1e9:
                left = _DAY - today % _DAY
                raise self._refusal(key, "gpu_seconds", key.gpu_seconds_per_day, "per day", left)

    def _refusal(
        self, key: ApiKey, limit: str, value: float, per: str, seconds: float
    ) -> ServiceError:
        self._metrics.rejections.labels(key.name, limit).inc()
        message = (
            f"Rate limit reached for {limit.replace('_', ' ')} of key {key.name}: {value:,} {per}. "
            f"Please try again in {_duration(seconds)}."
        )
        return ServiceError("rate_limit_exceeded", message, retry_after=seconds)

    def _headers(self, key: ApiKey, account: _Account) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, of those limits that the key has."""
        limits = {
            "requests": (key.requests_per_minute, account.requests),
            "tokens": (key.tokens_per_minute, account.tokens),
        }
        headers = {}
        for name, (limit, taken) in limits.items():
            if limit is not None:
                amount = taken.add(0, limit, self._clock())
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(int(limit - amount), 0))
                headers[f"x-ratelimit-reset-{name}"] = _duration(amount * _MINUTE / limit)
        return headers

    def _settle(
        self, key: ApiKey, account: _Account, tokens: int, device_nanoseconds: int | None
    ) -> None:
        taken: float
        if device_nanoseconds is not None:
            self._tokens += tokens
            self._device_nanoseconds += device_nanoseconds
            taken = device_nanoseconds
        else:
            taken = tokens * self._device_nanoseconds / max(self._tokens, 1)
        account.tokens.add(tokens, key.tokens_per_minute, self._clock())
        self._begin_day(account, self._wall_clock())
        account.device_nanoseconds += taken

    def _begin_day(self, account: _Account, now: float) -> None:
        day = int(now // _DAY)
        if account.day != day:
            account.day, account.device_nanoseconds = day, 0.0


def _duration(seconds: float) -> str:
    """As in OpenAI's headers: 1s, 6m0s, 17ms."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    return text + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
