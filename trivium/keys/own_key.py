"""The key by which a stage calls the next one, from a file that may change."""

from pathlib import Path

from trivium.keys.watched_file import WatchedFile

AUTHORIZATION = "authorization"


class OwnKeyError(ValueError):
    """The file cannot be read, or has no key in it."""


class OwnKey:
    """Raises OwnKeyError; a file that goes bad later leaves the last key in force."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path, _read)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What gRPC calls carry of it."""
        return ((AUTHORIZATION, f"Bearer {self._file.content}"),)


def own_metadata(key: OwnKey | None) -> tuple[tuple[str, str], ...]:
    """The same, and nothing for a stage without a key."""
    return () if key is None else key.metadata()


def _read(path: Path) -> str:
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise OwnKeyError(f"{path}: cannot be read: {error}") from None
    if not key or not key.isprintable() or " " in key:
        raise OwnKeyError(f"{path}: expected a key, and nothing else")
    return key
