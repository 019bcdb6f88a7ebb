"""Errors as clients of the OpenAI API know them.

Which error has which status, type and code stands in `trivium.wire.errors` alone.
"""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from rest_facade.json_encoding import encode
from trivium.wire import telemetry
from trivium.wire.errors import ServiceError


class ErrorResponse(Response):
    """A ServiceError as an HTTP answer, with the headers that its status asks for."""

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
        return {"retry-after": str(min(max(math.ceil(error.retry_after or 1), 1), 60))}
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status == 504:
        return {"x-should-retry": "false"}  # most of the work was done; again it would take as long
    if status in (408, 413):
        return {"connection": "close"}  # the rest of the body is not wanted
    return {}


def error_body(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error object, as a body or as the last event of a stream."""
    body = error.body()
    if error.code == "internal_error":
        body["error"]["message"] += f" (request id: {telemetry.request_id.get()})"
    return body
