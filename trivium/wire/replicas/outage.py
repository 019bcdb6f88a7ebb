"""One warning for a lasting failure; brief ones, as when stages start, are expected."""

import logging
import time

log = logging.getLogger(__name__)

OUTAGE_SECONDS = 30.0  # longer than most models take to load
_MAX_WARNINGS = 5  # per outage, as its reason changes


class Outage:
    """Warns of something that keeps failing: once per reason."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._logged: set[str] = set()

    def failed(self, what: str, reason: str) -> None:
        """It is failing now."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        is_new = reason not in self._logged and len(self._logged) < _MAX_WARNINGS
        if is_new and now - self._began >= OUTAGE_SECONDS:
            log.warning("%s: %s", what, reason)
            self._logged.add(reason)

    def ended(self) -> None:
        """It works now."""
        self._began = None
        self._logged.clear()
