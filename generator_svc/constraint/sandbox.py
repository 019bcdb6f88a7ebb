"""Compiles untrusted constraints in a sandboxed child process.

    python -m generator_svc.constraint.sandbox TOKENIZER VOCABULARY_SIZE EOS_ID …

Reads lines of JSON, {"kind", "text"}, and answers each with a line, {"code", "message", "text"}:
either `text` in a form that compiles, loosened if the caller allows that, or `code` and `message`
of the error. The other fields are null; all are if the machine was too busy to tell. The process
loads the tokens once and forks for every line, so a constraint that takes too much time or memory,
or overflows the stack, only ends its own fork.
"""

import contextlib
import json
import os
import random
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from generator_svc.constraint.json_schema import loosened_text
from generator_svc.constraint.llguidance import CompiledConstraint, TokenTable, grammar_of
from generator_svc.sequence import ConstraintError

CPU_SECONDS = 1.0  # a constraint that takes longer is too complex
WALL_SECONDS = 2.5  # taking longer says nothing about the constraint: other processes had the CPU
_MEMORY_BYTES = 512 * 2**20
_STACK_BYTES = 2**20  # half of the smallest stack of a generator thread

# After this long, a compilation yields to running streams: if they leave no core idle, it gets a
# tenth of one. Ordinary constraints take 20 to 70 ms of CPU time.
_FULL_PRIORITY_SECONDS = 0.2
_NICENESS = 10

_WALKS = 3
_WALK_TOKENS = 120
_SHORT_WALK_TOKENS = 16  # enough to enter a schema
_WALK_SECONDS = 0.15  # of CPU time, usually 10 ms; computing masks delays every running stream

_KILLED_RESPONSE: dict[str, str | None] = {
    "code": "json_schema_too_complex",
    "message": "The constraint takes too much time or memory to compile.",
    "text": None,
}
_TOO_BUSY_RESPONSE: dict[str, str | None] = {"code": None, "message": None, "text": None}


def compilable_text(table: TokenTable, kind: str, text: str) -> str:
    """The constraint in a form that compiles; raises ConstraintError if there is none.

    The text differs only if its schemas are lenient and something had to be dropped.
    """

    def compiles(schema: dict[str, Any]) -> bool:
        try:
            grammar = grammar_of("json_schema", json.dumps(schema))
            _walk(table, CompiledConstraint(table, kind, grammar), random.Random(0), short=True)
        except ConstraintError:
            return False
        return True

    try:
        dry_run(table, kind, text)
    except ConstraintError:
        loosened = loosened_text(kind, text, compiles)
        if loosened == text:
            raise
        dry_run(table, kind, loosened)
        return loosened
    return text


def dry_run(table: TokenTable, kind: str, text: str) -> None:
    """Compiles a constraint and takes random walks through it; raises ConstraintError.

    The constraint is refused if most walks fail, since a single one may be unrepresentative.
    """
    compiled = CompiledConstraint(table, kind, grammar_of(kind, text))
    failures = []
    for seed in range(_WALKS):
        try:
            _walk(table, compiled, random.Random(seed))
        except ConstraintError as error:
            failures.append(error)
    if 2 * len(failures) > _WALKS:
        raise failures[0]


def _walk(
    table: TokenTable, compiled: CompiledConstraint, draw: random.Random, short: bool = False
) -> None:
    """Advances by random allowed tokens; raises ConstraintError, also if masks take too long."""
    state = compiled.new_state()
    started = time.thread_time()
    for _ in range(_SHORT_WALK_TOKENS if short else _WALK_TOKENS):
        allowed = state.allowed()
        allowed[list(table.end_token_ids)] = False
        ids = np.flatnonzero(allowed)
        if not ids.size:
            return
        if time.thread_time() - started > _WALK_SECONDS:
            message = "The constraint is too complex: its token masks take too long to compute."
            raise ConstraintError("json_schema_too_complex", message)
        state.accept(int(ids[draw.randrange(ids.size)]))


def respond(table: TokenTable, line: str) -> str:
    """The response to one line, computed in a fork of this process."""
    reader, writer = os.pipe()
    fork = os.fork()
    if not fork:
        try:
            os.closerange(0, 2)  # or the pipes would stay open for as long as the fork lives
            _limit_resources()
            with open(writer, "w", encoding="utf-8") as pipe:
                pipe.write(_response(table, line) + "\n")
        finally:
            os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + WALL_SECONDS
    failure = _TOO_BUSY_RESPONSE
    if not select.select([reader], [], [], _FULL_PRIORITY_SECONDS)[0]:
        os.setpriority(os.PRIO_PROCESS, fork, _NICENESS)
    response = b""
    while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 2**16)
        if not part:
            failure = _KILLED_RESPONSE
            break
        response += part
    os.kill(fork, signal.SIGKILL)  # it has responded, or never will
    os.waitpid(fork, 0)
    os.close(reader)
    return response.decode().rstrip() if response.endswith(b"\n") else json.dumps(failure)


def _response(table: TokenTable, line: str) -> str:
    request = json.loads(line)
    try:
        text = compilable_text(table, request["kind"], request["text"])
    except ConstraintError as error:
        return json.dumps({"code": error.code, "message": error.message, "text": None})
    return json.dumps({"code": None, "message": None, "text": text})


def _limit_resources() -> None:
    """Has the system end this process if it exceeds its CPU time, memory or stack limit."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        _limit(resource.RLIMIT_STACK, _STACK_BYTES)
        with contextlib.suppress(OSError):  # without /proc, only llguidance's own limits apply
            statistics = Path("/proc/self/statm").read_text(encoding="ascii")
            in_use = int(statistics.split()[0]) * os.sysconf("SC_PAGE_SIZE")
            _limit(resource.RLIMIT_AS, in_use + _MEMORY_BYTES)


def _limit(kind: int, value: int) -> None:
    """Sets a resource limit, or keeps the hard limit in force if that is lower."""
    _, maximum = resource.getrlimit(kind)
    if maximum != resource.RLIM_INFINITY:
        value = min(value, maximum)
    resource.setrlimit(kind, (value, value))


def main() -> None:
    """Responds to lines from stdin until it is closed."""
    file, size, *eos_token_ids = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends when the generator closes its stdin
    table = TokenTable(Path(file), int(size), [int(token) for token in eos_token_ids])
    print("ready", flush=True)
    for line in sys.stdin:
        print(respond(table, line), flush=True)


if __name__ == "__main__":
    main()
