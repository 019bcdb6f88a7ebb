"""Small child processes for the supervisor, and a log of what happens to them."""

import asyncio
import sys
from pathlib import Path

from trivium.cli.supervisor import Stage

# Writes "NAME ready" to the log, "NAME stopped" on SIGTERM.
CHILD = """
import os, signal, sys
log, name, tail = sys.argv[1:]
def note(word):
    with open(log, "a") as file:
        file.write(f"{name} {word}\\n")
def stop(number, frame):
    note("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note("ready")
exec(tail)
while True:
    signal.pause()
"""


class Children:
    """Makes stages whose processes write to one log."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()

    def stage(self, name: str, then: str = "pass") -> Stage:
        command = (sys.executable, "-c", CHILD, str(self.log), name, then)
        return Stage(name, command, lambda: self.until(f"{name} ready"))

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    async def until(self, line: str) -> None:
        while line not in self.lines():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
