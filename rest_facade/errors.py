"""Errors in the format of the OpenAI API.

Their statuses, types and codes are defined in `trivium.wire.errors` only.
"""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from rest_facade.json_encoding import encode
from trivium.wire import telemetry
from trivium.wire.errors import ServiceError

_MAX_RETRY_SECONDS = 60


class ErrorResponse(Response):
    """A ServiceError as an HTTP response, with the headers that its status requires."""

    media_type = "application/json"

    def __init__(self, error: ServiceError, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(
            content=encode(error_body(error)),
            status_code=error.kind.http,
            headers={**_headers(error), **(headers or {})},
        )


def _headers(error: ServiceError) -> dict[str, str]:
    status = error.kind.http
    if status in (429, 503):
        seconds = math.ceil(error.retry_after or 1)
        # Clients should not wait for hours.
        give_up = {"x-should-retry": "false"} if seconds > _MAX_RETRY_SECONDS else {}
        return {"retry-after": str(min(max(seconds, 1), _MAX_RETRY_SECONDS)), **give_up}
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status == 504:
        return {"x-should-retry": "false"}  # a retry would take as long again
    if status in (408, 413):
        return {"connection": "close"}  # do not read the rest of the body
    return {}


def error_body(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error object, for a response body or a stream's last event."""
    body = error.body()
    if error.code == "internal_error":
        body["error"]["message"] += f" (request id: {telemetry.request_id.get()})"
    return body
