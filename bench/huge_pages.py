"""Sets the generators' huge-page environment for a benchmark and the processes it starts."""

import os
import sys

from trivium.cli.pipeline import huge_pages


def restart() -> None:
    """Restarts this program if its environment lacks the variable, which glibc reads at startup."""
    wanted = huge_pages()
    if wanted:
        os.environ |= wanted
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
