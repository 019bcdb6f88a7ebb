"""Compiles callers' constraints without blocking the event loop or trusting the constraint.

A constraint is first compiled in a sandboxed child process (generator_svc.constraint.sandbox),
since a malicious one may take minutes, exhaust memory or crash the process. The result is cached by
digest. Then it is compiled here, in a thread, once per request (generator_svc.constraint.llguidance
says why).
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import sys
from asyncio.subprocess import Process
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from generator_svc.constraint.llguidance import CompiledConstraint, TokenTable, grammar_of
from generator_svc.sequence import ConstraintError

log = logging.getLogger(__name__)

# Their sum stays below five seconds, within which every constraint is compiled or refused.
_QUEUE_SECONDS = 1.5
_COMPILE_SECONDS = 3.0

# Requests waiting for a compilation, which do not count against the engine's queue limits yet.
_MAX_WAITING = 512

# Holds the longest Lark grammar with every character escaped.
_MAX_RESPONSE_BYTES = 8 * 2**20

_THREADS = 2
_ENTRY_BYTES = 500  # overhead of a cache entry, besides its text


class ConstraintsUnavailable(Exception):
    """Constraints are not supported with this model's type of tokenizer."""


class CompilerBusy(Exception):
    """Too many constraints are waiting, the sandbox gets too little CPU time, or the system lacks
    the processes or memory for it."""


@dataclass(frozen=True)
class CompileResult:
    """A grammar for llguidance, or the error from compiling it."""

    grammar: str = ""
    error: ConstraintError | None = None

    @property
    def size_in_bytes(self) -> int:
        """Approximate size of the cache entry."""
        return _ENTRY_BYTES + len(self.grammar.encode())


class CompileCache:
    """An LRU cache of results by digest, of up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.size_in_bytes = 0
        self._max_bytes = max_bytes
        self._results: OrderedDict[bytes, CompileResult] = OrderedDict()

    def get(self, digest: bytes) -> CompileResult | None:
        result = self._results.get(digest)
        if result is not None:
            self._results.move_to_end(digest)
        return result

    def put(self, digest: bytes, result: CompileResult) -> None:
        self._results[digest] = result
        self.size_in_bytes += result.size_in_bytes
        while self.size_in_bytes > self._max_bytes:
            _, dropped = self._results.popitem(last=False)
            self.size_in_bytes -= dropped.size_in_bytes


class SandboxWorker:
    """The child process that compiles untrusted constraints one at a time, restarted on failure."""

    def __init__(self, file: Path, vocabulary_size: int, eos_token_ids: tuple[int, ...]) -> None:
        module = "generator_svc.constraint.sandbox"
        self._command = [sys.executable, "-m", module, str(file), str(vocabulary_size)]
        self._command += [str(token_id) for token_id in eos_token_ids]
        self._process: asyncio.Task[Process] | None = None
        self._lock = asyncio.Lock()

    def start(self) -> asyncio.Task[Process]:
        """The process; starts it if it is not running or failed to start."""
        task = self._process
        if task is None or (task.done() and task.exception() is not None):
            task = self._process = asyncio.create_task(_spawn(self._command))
        return task

    async def close(self) -> None:
        """Kills the process, whatever it is doing."""
        task, self._process = self._process, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, CompilerBusy):
                await _end(await task)

    async def compile(self, kind: str, text: str) -> str:
        """The constraint's text in a form known to compile.

        Raises ConstraintError if there is none, CompilerBusy if this could not be decided in time.
        """
        await asyncio.shield(self.start())
        try:
            async with asyncio.timeout(_QUEUE_SECONDS):
                await self._lock.acquire()
        except TimeoutError:
            raise CompilerBusy from None
        try:
            request = json.dumps({"kind": kind, "text": text})
            # Retries once if the process was killed, for example for lack of memory.
            response = await self._request(request) or await self._request(request)
        finally:
            self._lock.release()
        if response is None:
            raise CompilerBusy
        if response["code"]:
            raise ConstraintError(response["code"], response["message"])
        if response["text"] is None:
            raise CompilerBusy
        return str(response["text"])

    async def _request(self, request: str) -> dict[str, Any] | None:
        """The response of the process; None if it has ended and is being restarted.

        If it does not respond in time, restarts it and raises CompilerBusy.
        """
        process = await asyncio.shield(self.start())
        try:
            line = await _exchange(process, request)
        except TimeoutError as error:
            await self._restart(f"no response within {_COMPILE_SECONDS:g} s")
            raise CompilerBusy from error
        if line.endswith(b"\n"):
            response: dict[str, Any] = json.loads(line)
            return response
        await _end(process)
        await self._restart(f"exited with status {process.returncode}")
        return None

    async def _restart(self, reason: str) -> None:
        log.warning("restarting the constraint sandbox process: %s", reason)
        await self.close()
        self.start()


async def _spawn(command: list[str]) -> Process:
    """Starts the process and waits until it is ready; raises CompilerBusy if it fails to start."""
    pipe = asyncio.subprocess.PIPE
    # Only a single-threaded process can fork safely.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, env=environment, limit=_MAX_RESPONSE_BYTES
        )
    except OSError as error:
        log.warning("the constraint sandbox process failed to start: %s", error)
        raise CompilerBusy from error
    assert process.stdout is not None
    try:
        is_ready = await process.stdout.readline() == b"ready\n"
    except asyncio.CancelledError:
        await _end(process)
        raise
    if not is_ready:
        await _end(process)
        reason = f"exited with status {process.returncode}"
        log.warning("the constraint sandbox process failed to start: %s", reason)
        raise CompilerBusy
    return process


async def _exchange(process: Process, request: str) -> bytes:
    """The process's response line, which lacks its newline if the process has ended.

    Raises TimeoutError.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(_COMPILE_SECONDS):
            process.stdin.write(request.encode() + b"\n")
            await process.stdin.drain()
            return await process.stdout.readline()
    return b""


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()


class ConstraintCompiler:
    """Compiles constraints for one model's tokens, on one event loop.

    `cache_bytes` bounds the cache of sandbox results.
    """

    def __init__(
        self,
        file: Path,
        vocabulary_size: int,
        eos_token_ids: tuple[int, ...],
        cache_bytes: int,
    ) -> None:
        self.cache = CompileCache(cache_bytes)
        self._model = (file, vocabulary_size, eos_token_ids)
        self._sandbox = SandboxWorker(file, vocabulary_size, eos_token_ids)
        self._threads = ThreadPoolExecutor(_THREADS, "constraint")
        self._table: asyncio.Future[TokenTable] | None = None
        self._running: dict[bytes, asyncio.Task[CompileResult]] = {}
        self._waiting = 0

    async def __aenter__(self) -> Self:
        """Starts loading the token table and the sandbox, ahead of the first request."""
        self._warm_up = asyncio.create_task(self._preload())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._warm_up, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sandbox.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def compile(self, kind: str, text: str) -> CompiledConstraint:
        """A constraint for one request, never shared with another.

        Raises ConstraintError, CompilerBusy or ConstraintsUnavailable.
        """
        if self._waiting >= _MAX_WAITING:
            raise CompilerBusy
        self._waiting += 1
        try:
            table = await self._load_tokens()
            result = await self._compile_result(kind, text)
            if result.error is not None:
                raise ConstraintError(result.error.code, result.error.message)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._threads, CompiledConstraint, table, kind, result.grammar
            )
        finally:
            self._waiting -= 1

    async def _preload(self) -> None:
        try:
            await self._load_tokens()
        except ConstraintsUnavailable as error:
            log.warning("requests with constraints will be rejected: %s", error)

    async def _load_tokens(self) -> TokenTable:
        if self._table is None:
            loop = asyncio.get_running_loop()
            self._table = loop.run_in_executor(self._threads, TokenTable, *self._model)
            self._sandbox.start()
        try:
            return await asyncio.shield(self._table)
        except ValueError as error:
            raise ConstraintsUnavailable(str(error)) from None

    async def _compile_result(self, kind: str, text: str) -> CompileResult:
        """The cached result, or a new one; concurrent callers share one compilation.

        The compilation continues if its first caller is cancelled.
        """
        digest = hashlib.sha256(f"{kind}\0{text}".encode()).digest()
        cached = self.cache.get(digest)
        if cached is not None:
            return cached
        if digest not in self._running:
            task = asyncio.create_task(self._compile_in_sandbox(digest, kind, text))
            self._running[digest] = task
            task.add_done_callback(lambda done: self._forget(digest, done))
        return await asyncio.shield(self._running[digest])

    def _forget(self, digest: bytes, done: asyncio.Task[CompileResult]) -> None:
        del self._running[digest]
        if not done.cancelled():
            done.exception()  # retrieved, even if every caller was cancelled

    async def _compile_in_sandbox(self, digest: bytes, kind: str, text: str) -> CompileResult:
        try:
            usable = await self._sandbox.compile(kind, text)
            loop = asyncio.get_running_loop()
            grammar = await loop.run_in_executor(self._threads, grammar_of, kind, usable)
            result = CompileResult(grammar)
        except ConstraintError as error:
            result = CompileResult(error=error)
        self.cache.put(digest, result)
        return result
