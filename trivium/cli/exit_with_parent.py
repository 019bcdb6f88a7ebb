"""Runs a command that dies with its parent: `python -I exit_with_parent.py PARENT_PID COMMAND …`.

Runs as a script, imports none of our packages, and is replaced by the command at once. On Linux,
the kernel kills the command when the parent dies, even by `kill -9`; elsewhere, only a parent that
exits in an orderly way stops the command.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent and becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before prctl took effect
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
