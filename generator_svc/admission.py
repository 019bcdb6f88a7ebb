"""Backpressure: a bound on waiting requests and on their prompt tokens. Thread-safe."""

import threading


class QueueFull(Exception):
    """The queue is full. `waiting_tokens` counts the prompt tokens in it."""

    def __init__(self, waiting_tokens: int) -> None:
        super().__init__(f"{waiting_tokens} prompt tokens are waiting already")
        self.waiting_tokens = waiting_tokens


class Admission:
    """Counts waiting requests and tokens against their bounds."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._lock = threading.Lock()
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self.requests = 0
        self.tokens = 0

    def enter(self, tokens: int) -> "Permit":
        """A place in the queue for a prompt of `tokens`; raises QueueFull.

        An empty queue takes a prompt of any length, which could never be admitted otherwise.
        """
        with self._lock:
            full = self.requests >= self._max_requests
            if full or (self.requests and self.tokens + tokens > self._max_tokens):
                raise QueueFull(self.tokens)
            self.requests += 1
            self.tokens += tokens
        return Permit(self, tokens)

    def leave(self, tokens: int) -> None:
        """Gives back a place for a prompt of `tokens`; see Permit.release."""
        with self._lock:
            self.requests -= 1
            self.tokens -= tokens


class Permit:
    """A place in the queue."""

    def __init__(self, admission: Admission, tokens: int) -> None:
        self._admission: Admission | None = admission
        self._tokens = tokens

    def release(self) -> None:
        """Gives the place back; idempotent."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.leave(self._tokens)
