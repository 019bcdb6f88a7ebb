"""What each API key may take: requests and tokens per minute, requests at once, device time a day.

A request is let in while something is left of each, and takes what it took when it ends: tokens and
device time may be overdrawn once, and are then paid back before the next request.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter

from trivium.keys.accounts import (
    MINUTE,
    Accounts,
    AccountsUnavailable,
    LocalAccounts,
    Standing,
)
from trivium.keys.key_file import ApiKey
from trivium.keys.keyed_request import KeyedRequest
from trivium.wire.errors import ServiceError

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0  # in which no request waits for accounts that could not be reached


class LimitMetrics:
    """What each key asked for, by the names of the key file."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "trivium_key_requests",
            "Completions requested by key, including those over a limit",
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
        self.store_errors = Counter(
            "trivium_limits_store_errors",
            "Failed accesses to the shared store of limits; the process then counts on its own",
            registry=registry,
        )


class RateLimits:
    """Holds requests to the limits of their keys, by `shared` accounts, or by those of this process
    where there are none or they cannot be reached."""

    def __init__(
        self,
        metrics: LimitMetrics,
        shared: Accounts | None = None,
        local: LocalAccounts | None = None,
    ) -> None:
        self._metrics = metrics
        self._shared = shared
        self._local = local or LocalAccounts()
        self._clock = time.monotonic
        self._shared_from = 0.0  # when they are to be tried again
        self._leaving: set[asyncio.Task[None]] = set()
        # Of all requests that ended well: what one that broke off is reckoned by.
        self._tokens = 0
        self._device_nanoseconds = 0

    @contextlib.asynccontextmanager
    async def admitted(self, key: ApiKey, request: KeyedRequest) -> AsyncIterator[None]:
        """Around a request of this key; raises ServiceError if it is over a limit.

        Sets the headers of its answer, and takes what `request` says in the end.
        """
        self._metrics.requests.labels(key.name).inc()
        lease = uuid.uuid4().hex
        accounts, standing = await self._enter(key, lease)
        request.headers = _headers(key, standing)
        if standing.over:
            self._metrics.rejections.labels(key.name, standing.over).inc()
            raise _refusal(key, standing)
        try:
            yield
        finally:
            leaving = self._leave(accounts, key, lease, *request.taken())
            # Whatever becomes of this request's own task.
            task = asyncio.create_task(leaving)
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Waits until all that ended is counted."""
        await asyncio.gather(*self._leaving)
        if self._shared is not None:
            await self._shared.close()

    async def _enter(self, key: ApiKey, request: str) -> tuple[Accounts, Standing]:
        if self._shared is not None and self._clock() >= self._shared_from:
            try:
                return self._shared, await self._shared.enter(key, request)
            except AccountsUnavailable as error:
                self._failed(error)
        return self._local, await self._local.enter(key, request)

    async def _leave(
        self,
        accounts: Accounts,
        key: ApiKey,
        request: str,
        tokens: int,
        device_nanoseconds: int | None,
    ) -> None:
        taken: float
        if device_nanoseconds is not None:
            self._tokens += tokens
            self._device_nanoseconds += device_nanoseconds
            taken = device_nanoseconds
        else:
            taken = tokens * self._device_nanoseconds / max(self._tokens, 1)
        try:
            await accounts.leave(key, request, tokens, taken)
        except AccountsUnavailable as error:
            self._failed(error)

    def _failed(self, error: AccountsUnavailable) -> None:
        self._shared_from = self._clock() + _PAUSE_SECONDS
        self._metrics.store_errors.inc()
        log.warning("limits are counted by this process alone: %s", error)


def _refusal(key: ApiKey, standing: Standing) -> ServiceError:
    limit, per, seconds = {
        "requests": (
            key.requests_per_minute,
            "per minute",
            _seconds(standing.requests + 1, key.requests_per_minute),
        ),
        "tokens": (
            key.tokens_per_minute,
            "per minute",
            _seconds(standing.tokens + 1, key.tokens_per_minute),
        ),
        "concurrent_requests": (key.concurrent_requests, "at once", 1.0),
        "gpu_seconds": (key.gpu_seconds_per_day, "per day", standing.seconds_to_midnight),
    }[standing.over]
    message = (
        f"Rate limit reached for {standing.over.replace('_', ' ')} of key {key.name}: {limit:,} "
        f"{per}. Please try again in {_duration(seconds)}."
    )
    return ServiceError("rate_limit_exceeded", message, retry_after=seconds)


def _seconds(amount: float, limit: int | None) -> float:
    """Until as much has leaked away that the limit is kept."""
    return 0.0 if limit is None else (amount - limit) * MINUTE / limit


def _headers(key: ApiKey, standing: Standing) -> dict[str, str]:
    """OpenAI's x-ratelimit headers, of those limits that the key has."""
    entered = 0 if standing.over else 1
    amounts = {
        "requests": (key.requests_per_minute, standing.requests + entered),
        "tokens": (key.tokens_per_minute, standing.tokens),
    }
    headers = {}
    for name, (limit, amount) in amounts.items():
        if limit is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(int(limit - amount), 0))
            headers[f"x-ratelimit-reset-{name}"] = _duration(amount * MINUTE / limit)
    return headers


def _duration(seconds: float) -> str:
    """As in OpenAI's headers: 1s, 6m0s, 17ms."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    return text + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
