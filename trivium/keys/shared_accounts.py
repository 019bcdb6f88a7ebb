"""Accounts that several processes share in Redis or Valkey: accounts.py as Lua scripts.

The server's time is used, so that processes need no common clock. Each running request is a lease
that its process renews, so the leases of a killed process expire.
"""

import asyncio
import contextlib

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from trivium.keys.accounts import DAY, MINUTE, ROUNDING, AccountsUnavailable, LimitStatus
from trivium.keys.key_file import ApiKey

LEASE_SECONDS = 60.0
_TIMEOUT_SECONDS = 1.0
_PREFIX = "trivium:limits:"

# KEYS: a hash with the usage, and a sorted set of leases by expiry time. A limit of 0 means none.
_ACCOUNT = f"""
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local function leak(name, limit, more)
  local amount = 0
  if limit > 0 then
    local amount_then = tonumber(redis.call('HGET', KEYS[1], name) or 0)
    local at = tonumber(redis.call('HGET', KEYS[1], name .. '_at') or now)
    -- The clock goes back when a replica with another one takes over.
    amount = math.max(amount_then - math.max(now - at, 0) * limit / {MINUTE}, 0) + more
  end
  redis.call('HSET', KEYS[1], name, string.format('%.17g', amount),
             name .. '_at', string.format('%.17g', now))
  return amount
end
local function device_nanoseconds(more)
  local day = tostring(math.floor(now / {DAY}))
  local amount = more
  if redis.call('HGET', KEYS[1], 'day') == day then
    amount = amount + tonumber(redis.call('HGET', KEYS[1], 'device_nanoseconds') or 0)
  end
  redis.call('HSET', KEYS[1], 'day', day, 'device_nanoseconds', string.format('%.17g', amount))
  redis.call('EXPIRE', KEYS[1], {2 * int(DAY)})
  return amount
end
"""
_ENTER = f"""{_ACCOUNT}
local most_requests, most_tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
local most_running, most_seconds = tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local requests, tokens = leak('requests', most_requests, 0), leak('tokens', most_tokens, 0)
local nanoseconds = device_nanoseconds(0)
local over = ''
if most_requests > 0 and requests + 1 - {ROUNDING} > most_requests then over = 'requests'
elseif most_tokens > 0 and tokens + 1 - {ROUNDING} > most_tokens then over = 'tokens'
elseif most_running > 0 and redis.call('ZCARD', KEYS[2]) >= most_running then
  over = 'concurrent_requests'
elseif most_seconds > 0 and nanoseconds >= most_seconds * 1e9 then over = 'gpu_seconds'
else
  leak('requests', most_requests, 1)
  redis.call('ZADD', KEYS[2], now + tonumber(ARGV[6]), ARGV[1])
  redis.call('EXPIRE', KEYS[2], {2 * int(DAY)})
end
local function text(number) return string.format('%.17g', number) end
return {{over, text(requests), text(tokens), text(nanoseconds), text({DAY} - now % {DAY})}}
"""
_LEAVE = f"""{_ACCOUNT}
redis.call('ZREM', KEYS[2], ARGV[1])
leak('tokens', tonumber(ARGV[2]), tonumber(ARGV[3]))
device_nanoseconds(tonumber(ARGV[4]))
"""
_RENEW = """
local time = redis.call('TIME')
for index, leases in ipairs(KEYS) do
  redis.call('ZADD', leases, 'XX', time[1] + time[2] / 1e6 + tonumber(ARGV[1]), ARGV[index + 1])
end
"""


class SharedAccounts:
    """Accounts at `url`, such as redis://host:6379/0.

    Must be created while the event loop runs; raises ValueError for an invalid URL.
    """

    def __init__(self, url: str, lease_seconds: float = LEASE_SECONDS) -> None:
        self._client = redis.asyncio.from_url(
            url,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),  # a call that timed out may have been executed
        )
        self._enter = self._client.register_script(_ENTER)
        self._leave = self._client.register_script(_LEAVE)
        self._renew = self._client.register_script(_RENEW)
        self._lease_seconds = lease_seconds
        self._running: dict[str, str] = {}  # leases, each with the sorted set it belongs to
        self._renewing = asyncio.create_task(self._renew_leases())

    async def enter(self, key: ApiKey, request: str) -> LimitStatus:
        """See Accounts."""
        limits = (
            key.requests_per_minute,
            key.tokens_per_minute,
            key.concurrent_requests,
            key.gpu_seconds_per_day,
        )
        account, leases = _names(key)
        try:
            exceeded, *amounts = await self._enter(
                keys=[account, leases],
                args=[request, *(limit or 0 for limit in limits), self._lease_seconds],
            )
        except (RedisError, OSError) as error:
            raise AccountsUnavailable(str(error)) from error
        if not exceeded:
            self._running[request] = leases
        return LimitStatus(exceeded, *map(float, amounts))

    async def leave(
        self, key: ApiKey, request: str, tokens: int, device_nanoseconds: float
    ) -> None:
        """See Accounts."""
        self._running.pop(request, None)
        arguments = [request, key.tokens_per_minute or 0, tokens, device_nanoseconds]
        try:
            await self._leave(keys=[*_names(key)], args=arguments)
        except (RedisError, OSError) as error:
            raise AccountsUnavailable(str(error)) from error

    async def close(self) -> None:
        """Stops renewing leases and closes the connections."""
        self._renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._renewing
        await self._client.aclose()

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            if self._running:
                leases = dict(self._running)
                with contextlib.suppress(RedisError, OSError):
                    await self._renew(keys=[*leases.values()], args=[self._lease_seconds, *leases])


def _names(key: ApiKey) -> tuple[str, str]:
    """The names of a key's hash and leases; braces keep both on one node of a cluster."""
    return f"{_PREFIX}{{{key.name}}}", f"{_PREFIX}{{{key.name}}}:running"
