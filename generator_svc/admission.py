"""How much may wait: a bound on requests and on their prompt tokens, shared between threads."""

import threading


class QueueFull(Exception):
    """No more may wait now. `waiting_tokens` tells how much does."""

    def __init__(self, waiting_tokens: int) -> None:
        super().__init__(f"{waiting_tokens} prompt tokens wait already")
        self.waiting_tokens = waiting_tokens


class Admission:
    """Counts what waits. One more than the bound raises QueueFull."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._lock = threading.Lock()
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self.requests = 0
        self.tokens = 0

    def enter(self, tokens: int) -> "Permit":
        """A place in the queue for a prompt of `tokens`; the first place is always given."""
        with self._lock:
            full = self.requests >= self._max_requests
            if full or (self.requests and self.tokens + tokens > self._max_tokens):
                raise QueueFull(self.tokens)
            self.requests += 1
            self.tokens += tokens
        return Permit(self, tokens)

    def leave(self, tokens: int) -> None:
        with self._lock:
            self.requests -= 1
            self.tokens -= tokens


class Permit:
    """A place in the queue, given back once."""

    def __init__(self, admission: Admission, tokens: int) -> None:
        self._admission: Admission | None = admission
        self._tokens = tokens

    def release(self) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.leave(self._tokens)
