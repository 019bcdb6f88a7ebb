"""Tries constraints out in processes of their own, which a hostile one may ruin.

    python -m generator_svc.constraint_trial TOKENIZER VOCABULARY_SIZE EOS_ID …

Reads a line of JSON, {"kind", "text"}, and answers with one, {"code", "message"}, both null when
the constraint can be used. This process has the tokens and forks for each question, so that one
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

import numpy as np

from generator_svc.constraint import CompiledConstraint, TokenTable, grammar_of
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
_WALK_SECONDS = 0.15  # of CPU; a usual one takes 10 ms, and running streams wait for each

_ENDED = {
    "code": "json_schema_too_complex",
    "message": "The constraint takes too much time or memory to compile.",
}


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


def _walk(table: TokenTable, compiled: CompiledConstraint, draw: random.Random) -> None:
    state = compiled.new_state()
    started = time.thread_time()
    for _ in range(_WALK_TOKENS):
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
            os.write(writer, _answer(table, line).encode())
        finally:
            os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + WALL_SECONDS
    if not select.select([reader], [], [], _EAGER_SECONDS)[0]:
        os.setpriority(os.PRIO_PROCESS, fork, _NICENESS)
        select.select([reader], [], [], max(0, deadline - time.monotonic()))
    os.kill(fork, signal.SIGKILL)  # it has answered, or never will
    os.waitpid(fork, 0)
    with open(reader, encoding="utf-8") as pipe:
        return pipe.read() or json.dumps(_ENDED)


def _answer(table: TokenTable, line: str) -> str:
    question = json.loads(line)
    code, message = None, None
    try:
        try_out(table, question["kind"], question["text"])
    except ConstraintError as error:
        code, message = error.code, error.message
    return json.dumps({"code": code, "message": message})


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
