"""File descriptors: as many as the system allows, and a log line when they run out.

Each connection takes one. Accepting resumes by itself once some are free again, but until then
libuv closes new connections without logging anything.
"""

import errno
import logging
import os
import resource
import threading
import time

log = logging.getLogger(__name__)

_MOST = 2**20  # some systems allow a thousand times more, and some libraries loop over all
_CHECK_SECONDS = 0.2


def prepare_open_files() -> None:
    """Raises this process's limit as far as allowed, and logs from now on when it is reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    threading.Thread(target=_watch, name="open-files", daemon=True).start()


def _watch() -> None:
    were_left = True
    while True:
        are_left = _are_left()
        if were_left and not are_left:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "no file descriptor is left of %d: connections cannot be taken until some end; "
                "raise the limit (ulimit -n) or add replicas",
                limit,
            )
        elif are_left and not were_left:
            log.warning("file descriptors are free again")
        were_left = are_left
        time.sleep(_CHECK_SECONDS)


def _are_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True
