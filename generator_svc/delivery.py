"""When new tokens leave the process: at once at low message rates, merged at high ones.

A message costs each stage about the same however many tokens it carries. Merging is decided only
here, where tokens are generated; later stages forward messages as they arrive. Knows nothing about
gRPC.
"""

import asyncio
import time
from collections import deque

from generator_svc.metrics import RequestMetrics
from generator_svc.sequence import Sequence, SequenceGroup, SequenceUpdate
from generator_svc.trace import record_phases

_WHOLE_UPDATES = 256


class UpdateQueue:
    """A call's updates that have not been sent yet. For the event loop's thread only.

    With `is_whole`, the caller needs the answer as a whole: updates are buffered until
    `_WHOLE_UPDATES` are pending, few enough to detokenize at once without delaying other calls.

    Observes TTFT and inter-token latencies when tokens are generated, not when they are sent.
    """

    def __init__(self, metrics: RequestMetrics) -> None:
        self.is_whole = False
        self._metrics = metrics
        self.arrived_at = time.monotonic()
        self._first: float | None = None  # when the first token was generated
        self._last: dict[int, float] = {}  # when each sequence's latest token was generated
        self._updates: list[SequenceUpdate] = []
        self._ready = asyncio.Event()

    def put(self, update: SequenceUpdate, now: float) -> None:
        """Adds an update from a step that ended at `now`; `take` returns it only after `send`."""
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
    def should_send(self) -> bool:
        """Whether pending updates should be sent without waiting for an urgent one."""
        return not self.is_whole or len(self._updates) >= _WHOLE_UPDATES

    def send(self) -> None:
        """Lets `take` return the pending updates, if there are any."""
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
        """Time to first token; None before there is one."""
        return None if self._first is None else self._first - self.arrived_at

    def observe_phases(self, group: SequenceGroup) -> None:
        """Observes the queue, prefill and decode times of a finished call; nothing if it was
        stopped before its first token."""
        if self._first is not None:
            self._metrics.phases(group, self._first, max(self._last.values()))

    def trace_phases(self, group: SequenceGroup) -> None:
        """Records the same phases in the trace of any call, as far as it got."""
        record_phases(group, self._first, max(self._last.values(), default=0.0))

    def _observe_first(self, sequence: Sequence, now: float) -> None:
        self._first = now
        self._metrics.first_token.observe(now - self.arrived_at)
        self._metrics.prompt_tokens.inc(sequence.prompt_length)
        self._metrics.queried_tokens.inc(sequence.prompt_length)
        self._metrics.cached_tokens.inc(sequence.cached_prompt_tokens)


class UpdateDispatcher:
    """Passes updates from the engine's thread to their calls' queues, and decides when to send.

    After the pending updates of `calls` calls have been sent, the next ones are held back for
    `calls / max_messages_per_second` seconds, but never longer than `max_interval_seconds`. Updates
    that arrive more slowly than that are sent at once, and the interval grows with the number of
    streams. The first and last update of each sequence are always sent at once and do not count.
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
        self._is_scheduled = False  # whether `_dispatch` is scheduled already
        self._pending: dict[UpdateQueue, None] = {}  # an ordered set
        self._due = 0.0  # pending updates are held back until then, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def deliver(self, updates: list[SequenceUpdate]) -> None:
        """Hands over a step's updates; called on the engine's thread.

        Wakes the loop if an update is urgent or `_dispatch` is not scheduled yet; otherwise the
        next `_dispatch` picks them up.
        """
        self._steps.append((time.monotonic(), updates))
        if not self._is_scheduled or any(update.is_urgent for update in updates):
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._dispatch)

    def _dispatch(self) -> None:
        self._is_scheduled = False  # before reading `_steps`, so that no update goes unnoticed
        while self._steps:
            now, updates = self._steps.popleft()
            for update in updates:
                queue: UpdateQueue = update.group.tag
                queue.put(update, now)
                if update.is_urgent:
                    queue.send()
                    self._pending.pop(queue, None)
                elif queue.should_send:
                    self._pending[queue] = None
        if self._pending and self._timer is None:
            if self._loop.time() >= self._due:
                self._send_pending()
            else:
                self._timer = self._loop.call_at(self._due, self._on_timer)
        self._is_scheduled = self._timer is not None

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatch()

    def _send_pending(self) -> None:
        for queue in self._pending:
            queue.send()
        seconds = len(self._pending) / self._max_messages_per_second
        self._due = self._loop.time() + min(seconds, self._max_interval_seconds)
        self._pending.clear()
