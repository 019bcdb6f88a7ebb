"""Reads a request's body within limits on size and time, and parses it as strict JSON.

Refuses charsets other than UTF-8, a BOM, NaN, Infinity, numbers that overflow a double, lone
surrogates and deep nesting. Knows nothing about what the JSON means.
"""

import asyncio
import codecs
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic_core import from_json
from starlette.requests import Request

from rest_facade.connection import ClientDisconnected
from trivium.json_size import JsonSize, TooManyValues
from trivium.wire.errors import ServiceError

MAX_DEPTH = 64

# Bodies up to this size are parsed inline, within a few milliseconds; larger ones in a thread, so
# that they do not delay streams. Only one thread, as each takes the GIL from the event loop.
INLINE_BYTES = 64 * 1024
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="parser")

Result = TypeVar("Result")


async def read_json(
    request: Request, max_bytes: int, seconds: float, convert: Callable[[dict[str, Any]], Result]
) -> Result:
    """What `convert` makes of the body; raises ServiceError or ClientDisconnected."""
    _check_headers(request, max_bytes)
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, max_bytes)
    except TimeoutError:
        message = f"The request body did not arrive within {seconds:g} seconds."
        raise ServiceError("request_read_timeout", message) from None
    if len(body) <= INLINE_BYTES:
        return convert(parse_json(body))
    work = asyncio.get_running_loop().run_in_executor(_PARSER, lambda: convert(parse_json(body)))
    return await work


def _check_headers(request: Request, max_bytes: int) -> None:
    media_type, *parameters = request.headers.get("content-type", "").lower().split(";")
    media_type = media_type.strip()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    charset = [p.partition("=")[2].strip(' "') for p in parameters if "charset" in p]
    if not is_json or not set(charset) <= {"utf-8", "utf8"}:
        raise ServiceError(
            "unsupported_media_type",
            "Unsupported content type: the body must be 'application/json' in UTF-8.",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ServiceError(
            "unsupported_media_type", "Unsupported content encoding: send the body uncompressed."
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        event = await request.receive()
        if event["type"] == "http.disconnect":
            raise ClientDisconnected
        body += event.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not event.get("more_body", False):
            return bytes(body)


def _too_large(max_bytes: int) -> ServiceError:
    return ServiceError("request_too_large", f"The request body is larger than {max_bytes} bytes.")


def parse_json(body: bytes) -> dict[str, Any]:
    """Parses `body` as a JSON object; raises ServiceError."""
    if len(body) > INLINE_BYTES:
        try:
            JsonSize().add(body)
        except TooManyValues as excess:
            raise _json_too_large(body[: excess.position], str(excess)) from None
        except ValueError as error:
            raise _invalid_json(str(error)) from None
    try:
        # Refuses what the module's docstring lists, except nesting up to 200 levels and 1e400.
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        why = str(error)
        if body.startswith(codecs.BOM_UTF8):
            why = "it begins with a byte order mark (BOM)"
        # The parser's words for a high surrogate without a low one.
        why = why.replace("unexpected end of hex escape", "a lone surrogate")
        raise _invalid_json(why) from None
    _check_nested(value, MAX_DEPTH)
    if not isinstance(value, dict):
        raise ServiceError("invalid_type", "Invalid type: the body must be a JSON object.")
    return value


def _check_nested(value: Any, depth_left: int) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _invalid_json("number out of range")
    elif isinstance(value, (dict, list)):
        if depth_left == 0:
            raise _invalid_json(f"nested deeper than {MAX_DEPTH} levels")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_nested(inner, depth_left - 1)


def _json_too_large(beginning: bytes, why: str) -> ServiceError:
    """The error for a body that is too large, naming the largest value that its beginning opens."""
    try:
        value = from_json(beginning, allow_inf_nan=False, allow_partial=True)
    except ValueError as error:
        return _invalid_json(str(error))
    param, largest = "", value
    for path, inner in _unclosed(value):
        if len(inner) >= len(largest):
            param, largest = path, inner
    code, kind = (
        ("array_above_max_length", "array")
        if isinstance(largest, list)
        else (
            "invalid_value",
            "object",
        )
    )
    message = f"Invalid '{param or 'body'}': {kind} too long. The body has {why}."
    return ServiceError(code, message, param or None)


def _unclosed(value: Any) -> Iterator[tuple[str, dict[str, Any] | list[Any]]]:
    """Yields the objects and arrays still open where the text ends, with their paths."""
    path = ""
    while isinstance(value, (dict, list)):
        yield path, value
        if not value:
            return
        if isinstance(value, list):
            path, value = f"{path}[{len(value) - 1}]", value[-1]
        else:
            key = next(reversed(value))
            path, value = f"{path}.{key[:64]}" if path else key[:64], value[key]


def _invalid_json(why: str) -> ServiceError:
    return ServiceError("invalid_json", f"We could not parse the JSON body of your request: {why}.")
