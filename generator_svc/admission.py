"""Admission control: bounds on queued requests and on their prompt tokens. Thread-safe."""

import threading


class QueueFull(Exception):
    """The queue is full. `waiting_tokens` is the number of queued prompt tokens."""

    def __init__(self, waiting_tokens: int) -> None:
        super().__init__(f"{waiting_tokens} prompt tokens are already waiting")
        self.waiting_tokens = waiting_tokens


class Admission:
    """Counts queued requests and prompt tokens against their limits."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._lock = threading.Lock()
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self.requests = 0
        self.tokens = 0

    def enter(self, tokens: int) -> "Permit":
        """Takes a place in the queue for a prompt of `tokens` tokens; raises QueueFull.

        An empty queue accepts a prompt of any length: one above the limit could otherwise never be
        admitted.
        """
        with self._lock:
            full = self.requests >= self._max_requests
            if full or (self.requests and self.tokens + tokens > self._max_tokens):
                raise QueueFull(self.tokens)
            self.requests += 1
            self.tokens += tokens
        return Permit(self, tokens)

    def leave(self, tokens: int) -> None:
        """Gives up the place of a prompt of `tokens` tokens; see Permit.release."""
        with self._lock:
            self.requests -= 1
            self.tokens -= tokens


class Permit:
    """A place in the queue."""

    def __init__(self, admission: Admission, tokens: int) -> None:
        self._admission: Admission | None = admission
        self._tokens = tokens

    def release(self) -> None:
        """Gives up the place; idempotent."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.leave(self._tokens)
