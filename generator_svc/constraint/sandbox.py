"""Tries constraints out in processes of their own, which a hostile one may ruin.

    python -m generator_svc.constraint.sandbox TOKENIZER VOCABULARY_SIZE EOS_ID …

Reads a line of JSON, {"kind", "text"}, and answers with one, {"code", "message", "text"}: the text
that can be used, which says less than the one read where that is allowed, or what is wrong with
it; the others are null. This process has the tokens and forks for each question, so that one
that takes too much time or memory, or overflows the stack, ends its fork alone. Knows nothing
about requests.
"""

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

CPU_SECONDS = 1.0
WALL_SECONDS = 1.5
_MEMORY_BYTES = 512 * 2**20
_STACK_BYTES = 2**20  # half of the least a thread of the generator may have

# What is not done by then makes room for running streams.
_EAGER_SECONDS = 0.06
_NICENESS = 19

_WALKS = 3
_WALK_TOKENS = 120
_SHORT_WALK_TOKENS = 16  # enough to get into a schema
_WALK_SECONDS = 0.15  # of CPU; a usual one takes 10 ms, and running streams wait for each

_ENDED = {
    "code": "json_schema_too_complex",
    "message": "The constraint takes too much time or memory to compile.",
    "text": None,
}


def usable(table: TokenTable, kind: str, text: str) -> str:
    """The constraint as it can be used; raises ConstraintError where it cannot.

    It is another one only where its schemas are lenient and something had to go.
    """

    def compiles(schema: dict[str, Any]) -> bool:
        try:
            grammar = grammar_of("json_schema", json.dumps(schema))
            _walk(table, CompiledConstraint(table, kind, grammar), random.Random(0), short=True)
        except ConstraintError:
            return False
        return True

    try:
        try_out(table, kind, text)
    except ConstraintError:
        loosened = loosened_text(kind, text, compiles)
        if loosened == text:
            raise
        try_out(table, kind, loosened)
        return loosened
    return text


def try_out(table: TokenTable, kind: str, text: str) -> None:
    """Compiles a constraint and walks a little way into it at random; raises ConstraintError.

    It is refused where most walks fail: a single one may have taken a way that nobody goes.
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
    state = compiled.new_state()
    started = time.thread_time()
    for _ in range(_SHORT_WALK_TOKENS if short else _WALK_TOKENS):
        allowed = state.allowed()
        allowed[list(table.end_token_ids)] = False
        ids = np.flatnonzero(allowed)
        if not ids.size:
            return
        if time.thread_time() - started > _WALK_SECONDS:
            message = "The constraint is too complex: its tokens take too long to find."
            raise ConstraintError("json_schema_too_complex", message)
        state.accept(int(ids[draw.randrange(ids.size)]))


def answer(table: TokenTable, line: str) -> str:
    """The answer to one line, found in a fork of this process."""
    reader, writer = os.pipe()
    fork = os.fork()
    if not fork:
        try:
            os.closerange(0, 2)  # nobody is to wait for the end of these
            _limit_myself()
            with open(writer, "w", encoding="utf-8") as pipe:
                pipe.write(_answer(table, line) + "\n")
        finally:
            os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + WALL_SECONDS
    if not select.select([reader], [], [], _EAGER_SECONDS)[0]:
        os.setpriority(os.PRIO_PROCESS, fork, _NICENESS)
    said = b""
    while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 2**16)
        if not part:
            break
        said += part
    os.kill(fork, signal.SIGKILL)  # it has answered, or never will
    os.waitpid(fork, 0)
    os.close(reader)
    return said.decode().rstrip() if said.endswith(b"\n") else json.dumps(_ENDED)


def _answer(table: TokenTable, line: str) -> str:
    question = json.loads(line)
    try:
        text = usable(table, question["kind"], question["text"])
    except ConstraintError as error:
        return json.dumps({"code": error.code, "message": error.message, "text": None})
    return json.dumps({"code": None, "message": None, "text": text})


def _limit_myself() -> None:
    """Ends this process when it takes more than it may."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES,) * 2)


def main() -> None:
    file, size, *eos_token_ids = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the generator's end is the end of its input
    table = TokenTable(Path(file), int(size), [int(token) for token in eos_token_ids])
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(table, line), flush=True)


if __name__ == "__main__":
    main()
