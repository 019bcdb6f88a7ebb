"""Stop signals: SIGTERM, SIGINT and SIGHUP."""

import asyncio
import signal
import sys

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_at_stop_signal() -> None:
    """From now on, and until StopSignals are made, a stop signal ends the process with status 0.

    As process 1 of a container, one that only loads would ignore it, and serve on afterwards.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))


class StopSignals:
    """The `first` stop signal asks to drain, the `second` to end at once.

    Made while the event loop runs.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()
