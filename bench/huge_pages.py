"""The environment that generators get for their memory, for a benchmark and all it starts."""

import os
import sys

from trivium.cli.pipeline import huge_pages


def restart() -> None:
    """Starts this program anew where its environment lacks it: glibc reads it at the start."""
    wanted = huge_pages()
    if wanted:
        os.environ |= wanted
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
