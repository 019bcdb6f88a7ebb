"""Tries constraints out in a process of its own, which a hostile one may ruin.

    python -m generator_svc.constraint_trial TOKENIZER VOCABULARY_SIZE EOS_ID …

Reads a line of JSON, {"kind", "text"}, and answers with one, {"code", "message"}, both null when
the constraint can be used. One that takes too much time or memory, or overflows the stack, ends
the process; that is an answer too. Knows nothing about requests.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from generator_svc.constraint import CompiledConstraint, TokenTable, grammar_of
from generator_svc.sequence import ConstraintError

CPU_SECONDS = 1.0
MEMORY_BYTES = 512 * 2**20

_STACK_BYTES = 2**20  # half of the least a thread of the generator may have
_WALKS = 3
_WALK_TOKENS = 120
_WALK_SECONDS = 0.15  # of CPU; a usual one takes 10 ms, and running streams wait for each
_NICENESS = 10  # running streams go first


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
    """The answer to one line."""
    question = json.loads(line)
    code, message = None, None
    try:
        try_out(table, question["kind"], question["text"])
    except ConstraintError as error:
        code, message = error.code, error.message
    return json.dumps({"code": code, "message": message})


def serve(table: TokenTable) -> None:
    """Answers until there are no more questions; the timer kills this process."""
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        reply = answer(table, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


def limit_memory() -> None:
    """Whatever this process has now, and MEMORY_BYTES more."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    file, size, *eos_token_ids = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the generator's end is the end of its input
    os.nice(_NICENESS)
    table = TokenTable(Path(file), int(size), [int(token) for token in eos_token_ids])
    if sys.platform == "linux":
        limit_memory()
    print("ready", flush=True)
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=serve, args=(table,))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
