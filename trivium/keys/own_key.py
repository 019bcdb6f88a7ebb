"""The API key that a stage presents to the next one, from a file that may change."""

from pathlib import Path

from trivium.keys.watched_file import WatchedFile

AUTHORIZATION = "authorization"


class OwnKeyError(ValueError):
    """The file cannot be read, or does not contain exactly one key."""


class OwnKey:
    """The current key. Raises OwnKeyError when created; if the file becomes invalid later, the last
    valid key stays in use."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path, _read)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata that presents the key."""
        return ((AUTHORIZATION, f"Bearer {self._file.content}"),)


def own_metadata(key: OwnKey | None) -> tuple[tuple[str, str], ...]:
    """The metadata of `key`; empty for a stage without one."""
    return () if key is None else key.metadata()


def _read(path: Path) -> str:
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise OwnKeyError(f"{path}: cannot be read: {error}") from None
    if not key or not key.isprintable() or " " in key:
        raise OwnKeyError(f"{path}: expected one API key and nothing else")
    return key
