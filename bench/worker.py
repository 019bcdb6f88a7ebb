"""A separate process that holds one object, whose methods are called from here one at a time.

So the measured code does not share the GIL with the measuring code, and their memory use can be
told apart. The process ends when this one does, for whatever reason.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

_END_SECONDS = 10


class WorkerFailed(Exception):
    """The object could not be created, or a method raised; the message is the traceback."""


class Worker:
    """Calls `factory` ("module:name") with `arguments` in a new process; exiting the context ends
    it."""

    def __init__(self, factory: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, factory, arguments), name=factory, daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method in the process and waits for its result. Raises WorkerFailed."""
        self._pipe.send((method, arguments))
        return self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(_END_SECONDS)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            result, failure = self._pipe.recv()
        except EOFError:
            self._process.join(_END_SECONDS)
            message = f"{self._process.name} exited with {self._process.exitcode}"
            raise WorkerFailed(message) from None
        if failure:
            raise WorkerFailed(failure)
        return result


def _serve(pipe: Connection, factory: str, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent handles it
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            module, _, name = factory.partition(":")
            served = getattr(importlib.import_module(module), name)(*arguments)
        except Exception:
            pipe.send((None, traceback.format_exc()))
            return
        pipe.send((None, ""))
        while True:
            method, arguments = pipe.recv()
            try:
                answer = getattr(served, method)(*arguments), ""
            except Exception:
                answer = None, traceback.format_exc()
            pipe.send(answer)
