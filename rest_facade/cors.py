"""CORS: which web pages of other origins may call this server."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from rest_facade.errors import ErrorResponse
from trivium.wire import telemetry
from trivium.wire.errors import ServiceError

# Response headers that clients read; browsers hide them from pages unless they are listed here.
_EXPOSED = (
    telemetry.REQUEST_ID,
    "retry-after",
    "x-should-retry",
    "www-authenticate",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)


def cors(origins: Sequence[str]) -> list[Middleware]:
    """The middleware that allows pages of these origins; `*` allows all.

    Keys are sent in a header, so the browser's cookies and other credentials are not allowed.
    """
    if not origins:
        return []
    return [
        Middleware(
            _Cors,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=_EXPOSED,
        )
    ]


class _Cors(CORSMiddleware):
    """Starlette's, without plain-text responses to preflights."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        headers = {k: v for k, v in answer.headers.items() if not k.startswith("content-")}
        if answer.status_code == 200:
            return Response(status_code=204, headers=headers)
        why = bytes(answer.body).decode()
        return ErrorResponse(ServiceError("invalid_value", f"{why}."), headers)
