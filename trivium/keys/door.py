"""Who may make a gRPC call: the same keys and limits as over HTTP."""

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any

from trivium.keys.key_file import KeyFile
from trivium.keys.keyed_request import KeyedRequest, begin_request
from trivium.keys.own_key import AUTHORIZATION
from trivium.keys.rate_limits import RateLimits
from trivium.wire import telemetry
from trivium.wire.errors import ServiceError


class Door:
    """Lets calls in that bear a key of `keys`.

    With `limits`, calls of the methods `limited` count against those of their key. Without, only
    the keys of stages open. What such a call says of whose it is holds; no other may say that.
    """

    def __init__(
        self, keys: KeyFile, limits: RateLimits | None = None, limited: Collection[str] = ()
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._limited = limited

    @contextlib.asynccontextmanager
    async def admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        """Around a call; raises ServiceError if it may not be made."""
        metadata = dict(context.invocation_metadata() or ())
        key = self._keys.check(str(metadata.get(AUTHORIZATION, "")))
        if key.stage:
            yield
            return
        if self._limits is None:
            message = "Only keys of stages are accepted here: set `stage = true` for the key."
            raise ServiceError("invalid_api_key", message)
        if metadata.get(telemetry.KEY_NAME, key.name) != key.name:
            # Such as a facade with a client's key, to which all its clients' usage would go.
            message = (
                f"Only a stage's key may name another key: set `stage = true` for {key.name!r}."
            )
            raise ServiceError("invalid_api_key", message)
        telemetry.key_name.set(key.name)
        request = KeyedRequest(key)
        begin_request(request)
        if method not in self._limited:
            yield
            return
        try:
            async with self._limits.admitted(key, request):
                await _tell(context, request)
                yield
        except ServiceError as error:
            if error.code == "rate_limit_exceeded":
                await _tell(context, request)
            raise


async def _tell(context: Any, request: KeyedRequest) -> None:
    """Sends the limits and what is left of them as initial metadata."""
    if request.headers:
        headers, request.headers = tuple(request.headers.items()), {}
        await context.send_initial_metadata(headers)
