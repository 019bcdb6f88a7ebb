"""Admits gRPC calls by API key, with the same keys and limits as over HTTP."""

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any

from trivium.keys.key_file import KeyFile
from trivium.keys.keyed_request import KeyedRequest, begin_request
from trivium.keys.own_key import AUTHORIZATION
from trivium.keys.rate_limits import RateLimits
from trivium.wire import telemetry
from trivium.wire.errors import ServiceError


class KeyGuard:
    """Admits calls that present one of `keys`.

    With `limits`, calls of the methods in `limited` count towards the limits of their key. Without,
    only stage keys are accepted. Only calls with a stage key may name the key that they are charged
    to.
    """

    def __init__(
        self, keys: KeyFile, limits: RateLimits | None = None, limited: Collection[str] = ()
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._limited = limited

    @contextlib.asynccontextmanager
    async def admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        """Wraps a call; raises ServiceError if it is not allowed."""
        metadata = dict(context.invocation_metadata() or ())
        key = self._keys.check(str(metadata.get(AUTHORIZATION, "")))
        if key.stage:
            yield
            return
        if self._limits is None:
            message = "Only stage keys are accepted here: set `stage = true` for the key."
            raise ServiceError("invalid_api_key", message)
        if metadata.get(telemetry.KEY_NAME, key.name) != key.name:
            # For example a facade with a client's key, which would be charged for all its clients.
            message = f"Only a stage key may name another key: set `stage = true` for {key.name!r}."
            raise ServiceError("invalid_api_key", message)
        telemetry.key_name.set(key.name)
        request = KeyedRequest(key)
        begin_request(request)
        if method not in self._limited:
            yield
            return
        try:
            async with self._limits.admitted(key, request):
                await _send_limits(context, request)
                yield
        except ServiceError as error:
            if error.code == "rate_limit_exceeded":
                await _send_limits(context, request)
            raise


async def _send_limits(context: Any, request: KeyedRequest) -> None:
    """Sends the limits and what remains of them as initial metadata."""
    if request.headers:
        headers, request.headers = tuple(request.headers.items()), {}
        await context.send_initial_metadata(headers)
