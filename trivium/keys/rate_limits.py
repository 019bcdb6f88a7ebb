"""Limits of API keys: requests and tokens per minute, concurrent requests, device time per day.

A request is admitted as long as no limit is used up, and charged when it ends: tokens and device
time may be overdrawn by the requests in flight, and no further one is admitted until that has been
made up for.
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
    LimitStatus,
    LocalAccounts,
)
from trivium.keys.key_file import ApiKey
from trivium.keys.keyed_request import KeyedRequest
from trivium.wire.errors import ServiceError

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0  # before a shared store that could not be reached is tried again


class LimitMetrics:
    """Requests and rejections by key name, and failures of the shared store."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "trivium_key_requests",
            "Completion requests by API key, including rejected ones",
            ["key"],
            registry=registry,
        )
        self.rejections = Counter(
            "trivium_key_rejections",
            "Requests rejected because their API key was over a limit: requests, tokens, "
            "concurrent_requests or gpu_seconds",
            ["key", "limit"],
            registry=registry,
        )
        self.store_errors = Counter(
            "trivium_limits_store_errors",
            "Failed calls to the shared store of limits (Redis); until it works again, the "
            "process counts on its own",
            registry=registry,
        )


class RateLimits:
    """Enforces the limits of keys with `shared` accounts, or with those of this process if there
    are none or they cannot be reached."""

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
        self._shared_from = 0.0  # when the shared accounts are tried again; 0 while they work
        self._leaving: set[asyncio.Task[None]] = set()
        # Totals of requests with a known device time, to estimate that of the others.
        self._tokens = 0
        self._device_nanoseconds = 0

    @contextlib.asynccontextmanager
    async def admitted(self, key: ApiKey, request: KeyedRequest) -> AsyncIterator[None]:
        """Wraps a request with this key; raises ServiceError if the key is over a limit.

        Sets the headers of its response, and charges the request's usage at its end.
        """
        self._metrics.requests.labels(key.name).inc()
        lease = uuid.uuid4().hex
        accounts, status = await self._enter(key, lease)
        request.headers = _headers(key, status)
        if status.exceeded:
            self._metrics.rejections.labels(key.name, status.exceeded).inc()
            raise _refusal(key, status)
        try:
            yield
        finally:
            leaving = self._leave(accounts, key, lease, *request.taken())
            # In a separate task, as this request's may be cancelled.
            task = asyncio.create_task(leaving)
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Waits until all ended requests are charged."""
        await asyncio.gather(*self._leaving)
        if self._shared is not None:
            await self._shared.close()

    async def _enter(self, key: ApiKey, request: str) -> tuple[Accounts, LimitStatus]:
        if self._shared is not None and self._clock() >= self._shared_from:
            if self._shared_from:  # only this request waits to see whether it works again
                self._shared_from = self._clock() + _PAUSE_SECONDS
            try:
                status = await self._shared.enter(key, request)
            except AccountsUnavailable as error:
                self._failed(error)
            else:
                if self._shared_from:
                    log.info("the shared store of limits is available again")
                self._shared_from = 0.0
                return self._shared, status
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
        self._metrics.store_errors.inc()
        if not self._shared_from:  # a line per request would hide all others
            log.warning(
                "the shared store of limits is unavailable, counting in this process only: %s",
                error,
            )
        self._shared_from = self._clock() + _PAUSE_SECONDS


def _refusal(key: ApiKey, status: LimitStatus) -> ServiceError:
    limit, per, seconds = {
        "requests": (
            key.requests_per_minute,
            "per minute",
            _seconds(status.requests + 1, key.requests_per_minute),
        ),
        "tokens": (
            key.tokens_per_minute,
            "per minute",
            _seconds(status.tokens + 1, key.tokens_per_minute),
        ),
        "concurrent_requests": (key.concurrent_requests, "at once", 1.0),
        "gpu_seconds": (key.gpu_seconds_per_day, "per day", status.seconds_to_midnight),
    }[status.exceeded]
    message = (
        f"Rate limit reached for {status.exceeded.replace('_', ' ')} of key {key.name}: {limit:,} "
        f"{per}. Please try again in {_duration(seconds)}."
    )
    return ServiceError("rate_limit_exceeded", message, retry_after=seconds)


def _seconds(amount: float, limit: int | None) -> float:
    """Seconds until the bucket has drained from `amount` to `limit`."""
    return 0.0 if limit is None else (amount - limit) * MINUTE / limit


def _headers(key: ApiKey, status: LimitStatus) -> dict[str, str]:
    """OpenAI's x-ratelimit headers, for the limits that the key has."""
    admitted = 0 if status.exceeded else 1
    amounts = {
        "requests": (key.requests_per_minute, status.requests + admitted),
        "tokens": (key.tokens_per_minute, status.tokens),
    }
    headers = {}
    for name, (limit, amount) in amounts.items():
        if limit is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(int(limit - amount), 0))
            headers[f"x-ratelimit-reset-{name}"] = _duration(amount * MINUTE / limit)
    return headers


def _duration(seconds: float) -> str:
    """Formats a duration as in OpenAI's headers: 1s, 6m0s, 17ms."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    return text + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
