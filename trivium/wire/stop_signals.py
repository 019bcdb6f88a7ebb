"""Stop signals: SIGTERM, SIGINT and SIGHUP."""

import asyncio
import os
import signal


def stop_signals() -> list[signal.Signals]:
    """The signals that stop this process: not SIGHUP if it is ignored, as under nohup, which keeps
    a process running when its terminal is closed."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignores_hangup else [signal.SIGHUP])]


def exit_on_stop_signal() -> None:
    """Until StopSignals is created, a stop signal ends the process at once, with status 0.

    Otherwise, as process 1 of a container, a process that is still loading would ignore the signal
    and go on to serve. Not by sys.exit: an extension module that is being initialised turns that
    into an ImportError, and it would wait for threads.
    """
    for number in stop_signals():
        signal.signal(number, lambda *_: os._exit(0))


class StopSignals:
    """The `first` stop signal requests a drain, the `second` an immediate end.

    Must be created while the event loop runs.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()
