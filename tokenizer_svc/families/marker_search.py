"""Searches for a marker incrementally, in linear time.

White space before the marker is held back as well, as it belongs to the format and not to the text.
"""


class MarkerSearch:
    """Searches for a marker whose first character occurs in it only once."""

    def __init__(self, marker: str) -> None:
        assert marker[0] not in marker[1:], "The marker could overlap itself. This is a bug."
        self._marker = marker
        self._matched = 0  # characters of the marker matched so far
        self._space: list[str] = []
        self._spaces = 0
        self.dropped = ""  # the white space before the last marker found

    @property
    def held(self) -> int:
        """Number of trailing characters not yet known to be text or marker."""
        return self._spaces + self._matched

    def scan(self, text: str, position: int) -> tuple[str, int, bool]:
        """Reads from `position`; returns text to show, where it ended, whether the marker came.

        The text to show begins with what was held back before.
        """
        shown: list[str] = []
        while position < len(text):
            if not self._matched:
                found = text.find(self._marker[0], position)
                end = len(text) if found < 0 else found
                self._plain(text[position:end], shown)
                position = end
            position = self._match(text, position)
            if self._matched == len(self._marker):
                self._matched = 0
                self.dropped = "".join(self._space)
                self._drop_space()
                return "".join(shown), position, True
            if position < len(text):
                self._give_up(shown)
        return "".join(shown), position, False

    def flush(self, drop_space: bool, drop_marker: bool = False) -> str:
        """Ends the input: returns what was held back as text.

        `drop_space` drops it if it is only white space; `drop_marker` drops a partial marker and
        the white space before it.
        """
        if drop_marker and self._matched:
            self._matched, drop_space = 0, True
        if drop_space and not self._matched:
            self._drop_space()
        rest: list[str] = []
        self._give_up(rest)
        rest.extend(self._space)
        self._drop_space()
        return "".join(rest)

    def _match(self, text: str, position: int) -> int:
        marker = self._marker
        while (
            position < len(text)
            and self._matched < len(marker)
            and text[position] == marker[self._matched]
        ):
            position += 1
            self._matched += 1
        return position

    def _give_up(self, shown: list[str]) -> None:
        """What looked like the marker is text."""
        matched, self._matched = self._matched, 0
        self._plain(self._marker[:matched], shown)

    def _plain(self, text: str, shown: list[str]) -> None:
        kept = text.rstrip()
        if kept:
            shown.extend(self._space)
            shown.append(kept)
            self._drop_space()
        if len(kept) < len(text):
            self._space.append(text[len(kept) :])
            self._spaces += len(text) - len(kept)

    def _drop_space(self) -> None:
        self._space.clear()
        self._spaces = 0
