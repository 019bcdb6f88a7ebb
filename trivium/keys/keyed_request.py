"""A request, the key that it came with, and what it has taken."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field

from trivium.keys.key_file import ApiKey
from trivium.wire.errors import ServiceError


@dataclass
class KeyedRequest:
    """`key` is None where none is asked for, and for calls by another stage, which has checked it.

    `headers` are further ones of the answer. `taken` gives the tokens so far, of prompt and answer,
    and the device time in nanoseconds once that is known.
    """

    key: ApiKey | None = None
    headers: dict[str, str] = field(default_factory=dict)
    taken: Callable[[], tuple[int, int | None]] = lambda: (0, 0)

    def check_model(self, name: str, param: str = "model") -> None:
        """Raises ServiceError, of the field `param`, if the key does not open the model of that
        name; whether there is one, is not told."""
        if not self.may_use(name):
            message = f"The model `{name}` does not exist or you do not have access to it."
            raise ServiceError("model_not_found", message, param)

    def may_use(self, name: str) -> bool:
        """Whether the key, if there is one, opens the model of that name."""
        return self.key is None or self.key.models is None or name in self.key.models


_current: contextvars.ContextVar[KeyedRequest | None] = contextvars.ContextVar(
    "keyed_request", default=None
)


def current_request() -> KeyedRequest:
    """That of the current call; one without a key outside of any."""
    return _current.get() or KeyedRequest()


def begin_request(request: KeyedRequest) -> None:
    """Makes it the current call's."""
    _current.set(request)
