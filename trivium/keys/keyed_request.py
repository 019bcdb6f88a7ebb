"""A request, the API key that it was sent with, and its usage."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field

from trivium.keys.key_file import ApiKey
from trivium.wire.errors import ServiceError


@dataclass
class KeyedRequest:
    """`key` is None if none is required, and for calls by another stage, which has checked it.

    `headers` are to be added to the response. `taken` returns the request's usage: the tokens of
    prompt and answer so far, and the device time in nanoseconds, None until it is known.
    """

    key: ApiKey | None = None
    headers: dict[str, str] = field(default_factory=dict)
    taken: Callable[[], tuple[int, int | None]] = lambda: (0, 0)

    def check_model(self, name: str, param: str = "model") -> None:
        """Raises ServiceError for the field `param` if the key may not use the model `name`. The
        message does not reveal whether that model exists."""
        if not self.may_use(name):
            message = f"The model `{name}` does not exist or you do not have access to it."
            raise ServiceError("model_not_found", message, param)

    def may_use(self, name: str) -> bool:
        """Whether the key, if there is one, may use the model `name`."""
        return self.key is None or self.key.models is None or name in self.key.models


_current: contextvars.ContextVar[KeyedRequest | None] = contextvars.ContextVar(
    "keyed_request", default=None
)


def current_request() -> KeyedRequest:
    """The request of the current call; outside of calls, one without a key."""
    return _current.get() or KeyedRequest()


def begin_request(request: KeyedRequest) -> None:
    """Sets the request of the current call."""
    _current.set(request)
