"""Incrementally parses a tool call written as a JSON object with name and arguments."""

import json
from collections.abc import Set

from tokenizer_svc.families.json_scan import JsonScan
from tokenizer_svc.families.parser import CallArguments, CallStart, Segment

ARGUMENT_KEYS = ("arguments", "parameters")

_SPACE = " \t\n\r"


class CallObject:
    """Call `feed` until `done` or `wrong`.

    Arguments are streamed if the name comes before them. `begun` is true once anything has been
    emitted; until then `raw` keeps what was read, so that an object that is not a call can be shown
    as text.
    """

    def __init__(self, names: Set[str]) -> None:
        self.done = False
        self.wrong = False
        self.begun = False
        self.length = 0  # characters read
        self._names = names
        self._raw: list[str] = []
        self._expect = "{"
        self._scan = JsonScan()
        self._value: list[str] = []  # the key or value being read
        self._key = ""
        self._name: str | None = None  # once it is complete
        self._arguments: str | None = None
        self._streaming = False

    @property
    def raw(self) -> str:
        """What was read before the call began or the text went wrong."""
        return "".join(self._raw)

    def feed(self, text: str, position: int, segments: list[Segment]) -> int:
        """Reads from `position`; returns where the object ended, went wrong, or the text ended."""
        while position < len(text) and not (self.done or self.wrong):
            if self._expect == "name":
                after = self._read_name(text[position], position)
            elif self._expect in ("key", "value"):
                after = self._read_value(text, position, segments)
            else:
                after = self._punctuation(text[position], position, segments)
            self.length += after - position
            if not self.begun:
                self._raw.append(text[position:after])
            position = after
        return position

    def flush(self, segments: list[Segment]) -> None:
        """Ends the input: emits an incomplete call if its name is known."""
        if self._name is not None and not self.begun:
            self._begin(segments)
            if self._arguments:
                segments.append(CallArguments(self._arguments))

    def _punctuation(self, character: str, position: int, segments: list[Segment]) -> int:
        """Reads a character between keys and values."""
        if character in _SPACE:
            return position + 1
        expect = self._expect
        if expect == "{" and character == "{":
            self._expect = "key or }"
        elif expect in ("key or }", "next key") and character == '"':
            self._start("key")
            return position
        elif expect == ":" and character == ":":
            self._expect = "value or space"
        elif expect == "value or space":
            return self._begin_value(character, position, segments)
        elif expect == ", or }" and character == ",":
            self._expect = "next key"
        elif expect in (", or }", "key or }") and character == "}":
            self._end(segments)
            return position if self.wrong else position + 1
        else:
            self.wrong = True
            return position
        return position + 1

    def _start(self, expect: str) -> None:
        self._expect, self._scan = expect, JsonScan()
        self._value = []

    def _begin_value(self, character: str, position: int, segments: list[Segment]) -> int:
        self._start("value")
        if self._key == "name":
            self._expect, self.wrong = "name", character != '"'
            return position if self.wrong else position + 1
        if self._key in ARGUMENT_KEYS:
            self.wrong = character not in '{"'
            if character == "{" and self._name is not None:
                self._streaming = True
                if not self.begun:
                    self._begin(segments)
        return position

    def _read_name(self, character: str, position: int) -> int:
        """Reads the name's next character. Function names never need escaping in JSON."""
        name = "".join(self._value)
        if character == '"' and name in self._names:
            self._name, self._expect = name, ", or }"
            return position + 1
        self.wrong = not any(known.startswith(name + character) for known in self._names)
        if self.wrong:
            return position
        self._value.append(character)
        return position + 1

    def _begin(self, segments: list[Segment]) -> None:
        assert self._name is not None, "A call without a name began. This is a bug."
        self.begun = True
        segments.append(CallStart(self._name))

    def _read_value(self, text: str, position: int, segments: list[Segment]) -> int:
        after = self._scan.feed(text, position)
        piece = text[position:after]
        if self._streaming:
            if piece:
                segments.append(CallArguments(piece))
        else:
            self._value.append(piece)
        self.wrong = self._scan.wrong
        if self._scan.done:
            self._take(self._expect, "".join(self._value))
        return after

    def _take(self, expect: str, value: str) -> None:
        """Handles a complete key or value."""
        if expect == "key":
            self._key, self._expect = json.loads(value), ":"
            again = self._key == "name" and self._name is not None
            self.wrong = again or (self._key in ARGUMENT_KEYS and self._arguments is not None)
            return
        self._expect = ", or }"
        if self._streaming:
            self._streaming, self._arguments = False, ""
        elif self._key in ARGUMENT_KEYS:
            self._arguments = _object_text(value)
            self.wrong = self._arguments is None

    def _end(self, segments: list[Segment]) -> None:
        """Handles the end of the object: emits the call unless it was streamed."""
        if self._name is None:
            self.wrong = True
            return
        self.done = True
        if not self.begun:
            self._begin(segments)
            segments.append(CallArguments(self._arguments or "{}"))


def _object_text(value: str) -> str | None:
    """The JSON text of an object, which some models wrap in a string; None for anything else."""
    if value.startswith('"'):
        value = json.loads(value)
        scan = JsonScan()
        if scan.feed(value, 0) < len(value.rstrip()) or not scan.done:
            return None
    return value if value.lstrip().startswith("{") else None
