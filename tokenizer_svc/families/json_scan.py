"""Scans one JSON value incrementally, strictly by RFC 8259.

Builds no value: only tells whether the text is still valid and where the value ends.
"""

import re

_SPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
_MAX_NUMBER_LENGTH = 1000
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonScan:
    """Call `feed` until `done` or `wrong`. White space before the value is part of it.

    A top-level number ends at the first character that cannot be part of it.
    """

    def __init__(self) -> None:
        self.done = False
        self.wrong = False
        self._open: list[str] = []  # closing brackets still expected
        self._expect = "value"
        self._word = ""  # the rest of a literal, or what was read of a number
        self._is_key = False

    def feed(self, text: str, position: int) -> int:
        """Reads from `position`; returns where the value ended, went wrong, or the text ended."""
        while position < len(text) and not self.done:
            after = self._step(text, position)
            if self.wrong:
                return position
            position = after
        return position

    def _step(self, text: str, position: int) -> int:
        """Reads one character, or a run of a string; does not read the character after a number."""
        character = text[position]
        if self._expect == "string":
            return self._in_string(text, position)
        if self._expect == "escape":
            return self._after_backslash(character, position)
        if self._expect == "hex":
            return self._in_hex(character, position)
        if self._expect == "literal":
            return self._in_literal(character, position)
        if self._expect == "number":
            return self._in_number(character, position)
        if character not in _SPACE:
            self._token(character)
        return position + 1

    def _token(self, character: str) -> None:
        """Handles a character between values."""
        if self._expect in ("value", "value or ]") and not (
            self._expect == "value or ]" and character == "]"
        ):
            self._begin(character)
        elif self._expect in ("key", "key or }") and character == '"':
            self._is_key, self._expect = True, "string"
        elif self._expect == ":" and character == ":":
            self._expect = "value"
        elif self._expect in (", or end", "value or ]", "key or }"):
            self._after_value(character)
        else:
            self.wrong = True

    def _begin(self, character: str) -> None:
        if character == "{":
            self._open.append("}")
            self._expect = "key or }"
        elif character == "[":
            self._open.append("]")
            self._expect = "value or ]"
        elif character == '"':
            self._is_key, self._expect = False, "string"
        elif character in _LITERALS:
            self._word, self._expect = _LITERALS[character][1:], "literal"
        elif character == "-" or (character.isascii() and character.isdigit()):
            self._word, self._expect = character, "number"
        else:
            self.wrong = True

    def _after_value(self, character: str) -> None:
        if character == self._open[-1]:
            self._open.pop()
            self._end()
        elif character == "," and self._expect == ", or end":
            self._expect = "key" if self._open[-1] == "}" else "value"
        else:
            self.wrong = True

    def _end(self) -> None:
        """A value is complete."""
        self._expect = ", or end"
        self.done = not self._open

    def _in_string(self, text: str, position: int) -> int:
        match = _PLAIN.match(text, position)
        assert match is not None, "The pattern matches nothing, too. This is a bug."
        if match.end() > position:
            return match.end()
        if text[position] == '"':
            if self._is_key:
                self._is_key, self._expect = False, ":"
            else:
                self._end()
        elif text[position] == "\\":
            self._expect = "escape"
        else:
            self.wrong = True
        return position + 1

    def _after_backslash(self, character: str, position: int) -> int:
        if character == "u":
            self._word, self._expect = "", "hex"
        elif character in '"\\/bfnrt':
            self._expect = "string"
        else:
            self.wrong = True
        return position + 1

    def _in_hex(self, character: str, position: int) -> int:
        self._word += character
        self.wrong = character not in _HEX
        if len(self._word) == 4:
            self._expect = "string"
        return position + 1

    def _in_literal(self, character: str, position: int) -> int:
        self.wrong = character != self._word[0]
        self._word = self._word[1:]
        if not self._word:
            self._end()
        return position + 1

    def _in_number(self, character: str, position: int) -> int:
        if character in _NUMBER_CHARACTERS:
            self._word += character
            self.wrong = len(self._word) > _MAX_NUMBER_LENGTH  # longer ones are refused
            return position + 1
        self.wrong = _NUMBER.fullmatch(self._word) is None
        self._end()
        return position
