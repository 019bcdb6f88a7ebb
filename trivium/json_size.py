"""Counts the values in a JSON text before it is parsed.

Parsing holds the GIL from the first byte to the last, whichever thread does it, and stalls every
stream meanwhile. So a parse that would take too long must not start. How long it takes depends on
the number of values, and hardly on the length of strings.
"""

import re

# Objects, arrays and the fields of objects take up to a microsecond each; other values a tenth.
MAX_OBJECTS_ARRAYS_AND_FIELDS = 32_768
MAX_VALUES = 524_288
MAX_DIGITS = 400  # per number; a double has 17, and long integers take long to parse

CHUNK_BYTES = 64 * 1024
_KEPT = b'"{[:,0123456789'
_DROPPED = bytes(set(range(256)) - set(_KEPT))
_STRING = re.compile(b'"[^"]*"')
_LONG_NUMBER = re.compile(b"[0-9]{%d}" % (MAX_DIGITS + 1))


class TooManyValues(Exception):
    """Too many values. `position` is how far it is safe to parse to find out where."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


class JsonSize:
    """Counts the values in all JSON texts to be parsed for one request."""

    def __init__(self) -> None:
        self._heavy = self._values = 0

    def add(self, text: bytes) -> None:
        """Raises TooManyValues if there is too much to parse quickly, ValueError for a long number.

        Works in chunks, between which other threads can run.
        """
        at, in_string = 0, False
        while at < len(text):
            end = _end_of_chunk(text, at)
            outside, in_string = _outside_strings(text[at:end], in_string)
            self._count(outside, end)
            if _LONG_NUMBER.search(outside):
                raise ValueError(f"a number of more than {MAX_DIGITS} digits")
            at = end

    def _count(self, outside: bytes, end: int) -> None:
        self._heavy += outside.count(b"{") + outside.count(b"[") + outside.count(b":")
        self._values += outside.count(b",")
        if self._heavy > MAX_OBJECTS_ARRAYS_AND_FIELDS:
            reason = f"more than {MAX_OBJECTS_ARRAYS_AND_FIELDS} objects, arrays and fields"
            raise TooManyValues(reason, end)
        if self._values > MAX_VALUES:
            raise TooManyValues(f"more than {MAX_VALUES} values", end)


def _end_of_chunk(text: bytes, start: int) -> int:
    """Where the chunk ends: never between a backslash and the character it escapes."""
    end = min(start + CHUNK_BYTES, len(text))
    backslashes = end - start - len(text[start:end].rstrip(b"\\"))
    return end + backslashes % 2 if end < len(text) else end


def _outside_strings(chunk: bytes, in_string: bool) -> tuple[bytes, bool]:
    """The kept characters outside strings, and whether the chunk ends inside one."""
    kept = chunk.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _DROPPED)
    if in_string:
        kept = b'"' + kept
    in_string = kept.count(b'"') % 2 == 1
    return _STRING.sub(b"", kept + b'"' if in_string else kept), in_string
