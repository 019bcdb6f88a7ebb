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

_MAX_FILES = 2**20  # some systems allow a thousand times more, and some libraries loop over all
_CHECK_SECONDS = 0.2


def raise_open_file_limit() -> None:
    """Raises this process's limit as far as allowed, and logs from now on when it is reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    threading.Thread(target=_watch, name="open-files", daemon=True).start()


def _watch() -> None:
    was_available = True
    while True:
        is_available = _has_free()
        if was_available and not is_available:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "all %d file descriptors are in use: new connections fail until some are closed; "
                "raise the limit (ulimit -n) or add replicas",
                limit,
            )
        elif is_available and not was_available:
            log.warning("file descriptors are available again")
        was_available = is_available
        time.sleep(_CHECK_SECONDS)


def _has_free() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True
