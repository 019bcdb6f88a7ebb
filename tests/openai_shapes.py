"""OpenAI's published shapes, and checks of everything that httpx receives.

The schemas in schemas/openai are maintained by hand; Trivium's additions are marked `x-trivium`,
and no others are allowed. The official client's models are checked strictly too.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from referencing import Registry, Resource

FOLDER = Path(__file__).parent / "schemas" / "openai"
SCHEMAS: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*")}
_REGISTRY: Registry[Any] = Registry().with_resources(
    (f"{name}.json", Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
)
_VALIDATORS = {
    name: Draft202012Validator(schema, registry=_REGISTRY) for name, schema in SCHEMAS.items()
}
_MODELS: dict[str, Any] = {
    "chat.completion": ChatCompletion,
    "chat.completion.chunk": ChatCompletionChunk,
    "text_completion": Completion,
    "model": Model,
}


def check(name: str, body: Any) -> None:
    """Raises AssertionError unless `body` has exactly the shape `name`."""
    errors = [
        f"{error.json_path}: {error.message}" for error in _VALIDATORS[name].iter_errors(body)
    ]
    assert not errors, f"not a valid {name}: {errors}: {body}"
    # OpenAI sends nulls for the first token of an echo, which the client's models do not allow.
    if name in _MODELS and not _has_echo(body):
        _MODELS[name].model_validate(body, strict=True)
    if name == "list":
        for model in body["data"]:
            Model.model_validate(model, strict=True)


def _has_echo(body: Any) -> bool:
    logprobs = [choice.get("logprobs") for choice in body.get("choices", ())]
    return any(shown and None in shown.get("token_logprobs", ()) for shown in logprobs)


def check_answer(path: str, status: int, media_type: str, body: bytes, complete: bool) -> None:
    """Checks an answer as far as possible: a body, or a stream's events, of which the last may be
    cut.

    A complete stream ends with `[DONE]` or an error.
    """
    if media_type.startswith("text/event-stream"):
        _check_events(path, body.decode(errors="replace"), complete)
    elif not complete or not body:
        return
    elif status >= 400:
        check("error", json.loads(body))
    elif path.startswith("/v1/"):
        answer = json.loads(body)
        check(answer["object"], answer)


def _check_events(path: str, text: str, complete: bool) -> None:
    *events, rest = text.split("\n\n")
    name = "chat.completion.chunk" if "chat" in path else "text_completion.chunk"
    data = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
    ends = [number for number, event in enumerate(data) if event == "[DONE]" or '"error"' in event]
    for event in data:
        if event == "[DONE]":
            continue
        chunk = json.loads(event)
        check("error" if "error" in chunk else name, chunk)
    if complete:
        assert not rest, f"the stream's last event is truncated: {rest}"
        assert len(data) - 1 in ends, f"the stream does not end with [DONE] or an error: {data[-1]}"


class _Watch(httpx.AsyncByteStream, httpx.SyncByteStream):
    """Passes a body on, and checks it when it ends or is closed."""

    def __init__(self, inner: Any, check_body: Callable[[bytes, bool], None]) -> None:
        self._inner = inner
        self._check = check_body
        self._seen = bytearray()
        self._done = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            self._seen += part
            yield part
        self._end(complete=True)

    def __iter__(self) -> Iterator[bytes]:
        for part in self._inner:
            self._seen += part
            yield part
        self._end(complete=True)

    async def aclose(self) -> None:
        await self._inner.aclose()
        self._end(complete=False)

    def close(self) -> None:
        self._inner.close()
        self._end(complete=False)

    def _end(self, complete: bool) -> None:
        if not self._done:
            self._done = True
            self._check(bytes(self._seen), complete)


def _watch(request: httpx.Request, response: httpx.Response) -> httpx.Response:
    media_type = response.headers.get("content-type", "")

    def check_body(body: bytes, complete: bool) -> None:
        check_answer(request.url.path, response.status_code, media_type, body, complete)

    response.stream = _Watch(response.stream, check_body)
    return response


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While the context lasts, everything that clients based on httpx receive is checked."""
    sync, asynchronous = httpx.HTTPTransport, httpx.AsyncHTTPTransport
    plain, plain_async = sync.handle_request, asynchronous.handle_async_request

    def handle(self: Any, request: httpx.Request) -> httpx.Response:
        return _watch(request, plain(self, request))

    async def handle_async(self: Any, request: httpx.Request) -> httpx.Response:
        return _watch(request, await plain_async(self, request))

    sync.handle_request = handle  # type: ignore[method-assign]
    asynchronous.handle_async_request = handle_async  # type: ignore[method-assign]
    try:
        yield
    finally:
        sync.handle_request = plain  # type: ignore[method-assign]
        asynchronous.handle_async_request = plain_async  # type: ignore[method-assign]
