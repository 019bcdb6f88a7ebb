"""From a caller's constraint to one that can be kept, while everyone else's tokens go on.

A constraint is tried out in a process of its own first (generator_svc.constraint.sandbox), for
there are some that take minutes, all memory, or the process that compiles them. What came of it
is remembered by digest. Then it is compiled here, in a thread, for each request anew (see
generator_svc.constraint.llguidance for why). Knows nothing about gRPC or the engine.
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
from typing import Self

from generator_svc.constraint.llguidance import CompiledConstraint, TokenTable, grammar_of
from generator_svc.sequence import ConstraintError

log = logging.getLogger(__name__)

# Together below the five seconds in which every constraint is answered.
_TURN_SECONDS = 1.5
_TRIAL_SECONDS = 3.0

# A lark's longest text, each character of it escaped.
_LONGEST_ANSWER = 8 * 2**20

_THREADS = 2
_ENTRY_BYTES = 500  # about what an entry takes besides its texts


class ConstraintsUnavailable(Exception):
    """This model's tokenizer is of a kind that cannot be constrained."""


class CompilerBusy(Exception):
    """Too many new constraints wait to be tried out."""


@dataclass(frozen=True)
class Verdict:
    """What came of a trial: a grammar, or why there is none."""

    grammar: str = ""
    error: ConstraintError | None = None

    @property
    def size_in_bytes(self) -> int:
        return _ENTRY_BYTES + len(self.grammar.encode())


class VerdictCache:
    """Verdicts by digest, up to `most_bytes`; those not used for longest go first."""

    def __init__(self, most_bytes: int) -> None:
        self.size_in_bytes = 0
        self._most_bytes = most_bytes
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()

    def get(self, digest: bytes) -> Verdict | None:
        verdict = self._verdicts.get(digest)
        if verdict is not None:
            self._verdicts.move_to_end(digest)
        return verdict

    def put(self, digest: bytes, verdict: Verdict) -> None:
        self._verdicts[digest] = verdict
        self.size_in_bytes += verdict.size_in_bytes
        while self.size_in_bytes > self._most_bytes:
            _, dropped = self._verdicts.popitem(last=False)
            self.size_in_bytes -= dropped.size_in_bytes


class Trial:
    """The process that tries constraints out, one at a time; started anew should it fail."""

    def __init__(self, file: Path, vocabulary_size: int, eos_token_ids: tuple[int, ...]) -> None:
        module = "generator_svc.constraint.sandbox"
        self._command = [sys.executable, "-m", module, str(file), str(vocabulary_size)]
        self._command += [str(token_id) for token_id in eos_token_ids]
        self._process: asyncio.Task[Process] | None = None
        self._turn = asyncio.Lock()

    def start(self) -> asyncio.Task[Process]:
        """The process, on its way if it does not run yet."""
        if self._process is None:
            self._process = asyncio.create_task(_spawn(self._command))
        return self._process

    async def close(self) -> None:
        """Ends the process, whatever it does."""
        task, self._process = self._process, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConstraintsUnavailable):
                await _end(await task)

    async def ask(self, kind: str, text: str) -> str:
        """The constraint's text as it can be used.

        Raises ConstraintError where it cannot, and CompilerBusy after waiting in vain.
        """
        await asyncio.shield(self.start())
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise CompilerBusy from None
        try:
            process = await asyncio.shield(self.start())
            line = await _answer(process, json.dumps({"kind": kind, "text": text}))
            if not line.endswith(b"\n"):
                await self.close()
                self.start()
                raise CompilerBusy
        finally:
            self._turn.release()
        answer = json.loads(line)
        if answer["code"]:
            raise ConstraintError(answer["code"], answer["message"])
        return str(answer["text"])


async def _spawn(command: list[str]) -> Process:
    pipe = asyncio.subprocess.PIPE
    # A process of one thread is one that can fork.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, env=environment, limit=_LONGEST_ANSWER
    )
    assert process.stdout is not None
    try:
        is_ready = await process.stdout.readline() == b"ready\n"
    except asyncio.CancelledError:
        await _end(process)
        raise
    if not is_ready:
        await _end(process)
        raise ConstraintsUnavailable("the process that tries constraints out does not start")
    return process


async def _answer(process: Process, question: str) -> bytes:
    """The answer's line; without an end when there is none in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(_TRIAL_SECONDS):
            process.stdin.write(question.encode() + b"\n")
            await process.stdin.drain()
            return await process.stdout.readline()
    return b""


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()


class ConstraintCompiler:
    """Compiles constraints for one model's tokens; for one event loop.

    `cache_bytes` bounds what is remembered of constraints seen before.
    """

    def __init__(
        self,
        file: Path,
        vocabulary_size: int,
        eos_token_ids: tuple[int, ...],
        cache_bytes: int,
    ) -> None:
        self.cache = VerdictCache(cache_bytes)
        self._model = (file, vocabulary_size, eos_token_ids)
        self._trial = Trial(file, vocabulary_size, eos_token_ids)
        self._threads = ThreadPoolExecutor(_THREADS, "constraint")
        self._table: asyncio.Future[TokenTable] | None = None
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}

    async def __aenter__(self) -> Self:
        """Begins to load the tokens and the trial process, so that the first request finds them."""
        self._warm_up = asyncio.create_task(self._begin())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._warm_up, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._trial.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def compile(self, kind: str, text: str) -> CompiledConstraint:
        """A request's own constraint.

        Raises ConstraintError, CompilerBusy or ConstraintsUnavailable.
        """
        table = await self._load()
        verdict = await self._verdict(kind, text)
        if verdict.error is not None:
            raise ConstraintError(verdict.error.code, verdict.error.message)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, CompiledConstraint, table, kind, verdict.grammar
        )

    async def _begin(self) -> None:
        try:
            await self._load()
        except ConstraintsUnavailable as error:
            log.warning("requests with constraints will be refused: %s", error)

    async def _load(self) -> TokenTable:
        if self._table is None:
            loop = asyncio.get_running_loop()
            self._table = loop.run_in_executor(self._threads, TokenTable, *self._model)
            self._trial.start()
        try:
            return await asyncio.shield(self._table)
        except ValueError as error:
            raise ConstraintsUnavailable(str(error)) from None

    async def _verdict(self, kind: str, text: str) -> Verdict:
        """Remembered, or from a trial that goes on when its first caller leaves."""
        digest = hashlib.sha256(f"{kind}\0{text}".encode()).digest()
        known = self.cache.get(digest)
        if known is not None:
            return known
        if digest not in self._running:
            task = asyncio.create_task(self._try_out(digest, kind, text))
            self._running[digest] = task
            task.add_done_callback(lambda done: self._forget(digest, done))
        return await asyncio.shield(self._running[digest])

    def _forget(self, digest: bytes, done: asyncio.Task[Verdict]) -> None:
        del self._running[digest]
        if not done.cancelled():
            done.exception()  # seen, even when every caller has left

    async def _try_out(self, digest: bytes, kind: str, text: str) -> Verdict:
        try:
            usable = await self._trial.ask(kind, text)
            loop = asyncio.get_running_loop()
            grammar = await loop.run_in_executor(self._threads, grammar_of, kind, usable)
            verdict = Verdict(grammar)
        except ConstraintError as error:
            verdict = Verdict(error=error)
        self.cache.put(digest, verdict)
        return verdict
