"""How much there is in a JSON text, counted before anything is made of it.

Parsing holds the interpreter's lock from the first byte to the last, whichever thread does it, so
that every stream stands still meanwhile. What would take too long must therefore not begin. How
long it takes depends on how many values there are, and hardly on how long their texts are.
"""

import re

# Objects, arrays and the fields of objects take up to a microsecond each; other values a tenth.
MAX_OBJECTS_ARRAYS_AND_FIELDS = 32_768
MAX_VALUES = 524_288
MAX_DIGITS = 400  # of one number; a double has 17, and an integer takes longer the longer it is

CHUNK_BYTES = 64 * 1024
_KEPT = b'"{[:,0123456789'
_DROPPED = bytes(set(range(256)) - set(_KEPT))
_STRING = re.compile(b'"[^"]*"')
_LONG_NUMBER = re.compile(b"[0-9]{%d}" % (MAX_DIGITS + 1))


class Excess(Exception):
    """There is too much. `position` is how far one may safely parse to see in what."""

    def __init__(self, why: str, position: int) -> None:
        super().__init__(why)
        self.position = position


class JsonSize:
    """What is in one or several texts that are to be parsed for the same request."""

    def __init__(self) -> None:
        self._heavy = self._values = 0

    def add(self, text: bytes) -> None:
        """Raises Excess for more than can be parsed in a moment, ValueError for a long number.

        Other threads run in between.
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
            why = f"more than {MAX_OBJECTS_ARRAYS_AND_FIELDS} objects, arrays and fields"
            raise Excess(why, end)
        if self._values > MAX_VALUES:
            raise Excess(f"more than {MAX_VALUES} values", end)


def _end_of_chunk(text: bytes, start: int) -> int:
    """Not between a backslash and what it escapes."""
    end = min(start + CHUNK_BYTES, len(text))
    backslashes = end - start - len(text[start:end].rstrip(b"\\"))
    return end + backslashes % 2 if end < len(text) else end


def _outside_strings(chunk: bytes, in_string: bool) -> tuple[bytes, bool]:
    """The kept characters that are in no string, and whether the chunk ends within one."""
    kept = chunk.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _DROPPED)
    if in_string:
        kept = b'"' + kept
    in_string = kept.count(b'"') % 2 == 1
    return _STRING.sub(b"", kept + b'"' if in_string else kept), in_string
