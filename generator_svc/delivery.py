"""When new tokens leave the process: at once while messages are few, merged where they are many.

A message costs each stage about the same whatever it carries, so this is decided here alone, where
tokens arise; later stages pass on what comes. Knows nothing about gRPC.
"""

import asyncio
import time
from collections import deque

from generator_svc.metrics import RequestMetrics
from generator_svc.sequence import Sequence, SequenceGroup, SequenceUpdate
from generator_svc.trace import record_phases

_WHOLE_UPDATES = 256


class UpdateQueue:
    """A call's updates on their way to its messages. For the event loop's thread.

    With `is_whole` so many of them gather as can be decoded at once without holding up others.

    Observes TTFT and inter-token latencies as the tokens arise, not as they are sent.
    """

    def __init__(self, metrics: RequestMetrics) -> None:
        self.is_whole = False
        self._metrics = metrics
        self.arrived_at = time.monotonic()
        self._first: float | None = None  # when the first token arose
        self._last: dict[int, float] = {}  # when each sequence's last token arose
        self._updates: list[SequenceUpdate] = []
        self._ready = asyncio.Event()

    def put(self, update: SequenceUpdate, now: float) -> None:
        """Adds an update of a step that ended at `now`; `take` does not return for it yet."""
        self._updates.append(update)
        if update.token is None:
            return
        self._metrics.generated += 1
        index = update.sequence.index
        if index in self._last:
            self._metrics.next_token.observe(now - self._last[index])
        elif self._first is None:
            self._observe_first(update.sequence, now)
        self._last[index] = now

    @property
    def is_awaited(self) -> bool:
        """Whether what is pending should go out before first tokens and ends come."""
        return not self.is_whole or len(self._updates) >= _WHOLE_UPDATES

    def send(self) -> None:
        """Lets `take` return what is pending, if anything is."""
        if self._updates:
            self._ready.set()

    async def take(self) -> list[SequenceUpdate]:
        """Waits for `send` and returns all pending updates, at least one."""
        await self._ready.wait()
        self._ready.clear()
        updates, self._updates = self._updates, []
        return updates

    @property
    def first_token_seconds(self) -> float | None:
        """Time to the first token, once there is one."""
        return None if self._first is None else self._first - self.arrived_at

    def observe_phases(self, group: SequenceGroup) -> None:
        """Observes how long a finished call waited, was prefilled and decoded; not if it was
        stopped before its first token."""
        if self._first is not None:
            self._metrics.phases(group, self._first, max(self._last.values()))

    def trace_phases(self, group: SequenceGroup) -> None:
        """Records the same of any call, as far as it came, in its trace."""
        record_phases(group, self._first, max(self._last.values(), default=0.0))

    def _observe_first(self, sequence: Sequence, now: float) -> None:
        self._first = now
        self._metrics.first_token.observe(now - self.arrived_at)
        self._metrics.prompt_tokens.inc(sequence.prompt_length)
        self._metrics.queried_tokens.inc(sequence.prompt_length)
        self._metrics.cached_tokens.inc(sequence.cached_prompt_tokens)


class UpdateDispatcher:
    """Hands updates from the engine's thread to their calls' queues, and says when they are sent.

    When the pending updates of `calls` calls have been sent, the next are sent `calls /
    max_messages_per_second` seconds later, but after `max_interval_seconds` at the latest. So what
    comes no faster than that leaves at once, and an interval grows with the number of streams. The
    first and the last update of each sequence leave at once in any case, and do not count.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        max_messages_per_second: float,
        max_interval_seconds: float,
    ) -> None:
        self._loop = loop
        self._max_messages_per_second = max_messages_per_second
        self._max_interval_seconds = max_interval_seconds
        self._steps: deque[tuple[float, list[SequenceUpdate]]] = deque()
        self._is_awaited = False  # whether `_dispatch` will run without being called
        self._pending: dict[UpdateQueue, None] = {}  # a set in order
        self._due = 0.0  # the loop's time before which pending updates are held back
        self._timer: asyncio.TimerHandle | None = None

    def deliver(self, updates: list[SequenceUpdate]) -> None:
        """Hands over a step's updates; called on the engine's thread.

        The loop is woken for what is to be sent at once. All else it finds when it next looks.
        """
        self._steps.append((time.monotonic(), updates))
        if not self._is_awaited or any(update.is_urgent for update in updates):
            self._is_awaited = True
            self._loop.call_soon_threadsafe(self._dispatch)

    def _dispatch(self) -> None:
        self._is_awaited = False  # before looking, so that nothing is handed over unseen
        while self._steps:
            now, updates = self._steps.popleft()
            for update in updates:
                queue: UpdateQueue = update.group.tag
                queue.put(update, now)
                if update.is_urgent:
                    queue.send()
                    self._pending.pop(queue, None)
                elif queue.is_awaited:
                    self._pending[queue] = None
        if self._pending and self._timer is None:
            if self._loop.time() >= self._due:
                self._send_pending()
            else:
                self._timer = self._loop.call_at(self._due, self._on_timer)
        self._is_awaited = self._timer is not None

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatch()

    def _send_pending(self) -> None:
        for queue in self._pending:
            queue.send()
        seconds = len(self._pending) / self._max_messages_per_second
        self._due = self._loop.time() + min(seconds, self._max_interval_seconds)
        self._pending.clear()
