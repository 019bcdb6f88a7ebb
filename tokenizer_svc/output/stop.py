"""Searches for stop strings incrementally.

Text goes in, and text that is safe to show comes out. Of several stop strings, the one that
completes first wins; of those that end at the same character, the one that starts first, which is
the longest. The result does not depend on how the text is cut into pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopResult:
    """`text` may be shown now; `stop` is the stop string that ended the choice, if one did."""

    text: str
    stop: str | None = None


class StopStrings:
    """The stop strings of a request, prepared once and shared by its choices."""

    def __init__(self, texts: Sequence[str]) -> None:
        assert all(texts), "An empty stop string reached the matcher. This is a bug."
        # Longest first, so that the first to complete at a character is also the first to start.
        self.texts = tuple(sorted(texts, key=len, reverse=True))
        self.failures = tuple(_failure_table(text) for text in self.texts)


def _failure_table(text: str) -> list[int]:
    """Knuth-Morris-Pratt: entry i is the length of the longest proper border of text[:i + 1]."""
    table = [0] * len(text)
    length = 0
    for position in range(1, len(text)):
        while length and text[position] != text[length]:
            length = table[length - 1]
        if text[position] == text[length]:
            length += 1
        table[position] = length
    return table


class StopMatcher:
    """Holds back the end of the text only while it may yet become a stop string."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.texts)  # characters of each stop string matched so far
        self._held = ""
        self._stopped = False

    def push(self, text: str, armed: bool = True) -> StopResult:
        """Takes the next piece. A match that completes while not `armed` is ordinary text."""
        assert not self._stopped, "Text came after a stop string. This is a bug."
        if not self._stops.texts:
            return StopResult(text)
        whole = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            completed = self._advance(character)
            if completed is not None and armed:
                return self._stop(whole[: position - len(completed)], completed)
        held = max(self._matched, default=0)
        self._held = whole[len(whole) - held :]
        return StopResult(whole[: len(whole) - held])

    def flush(self) -> StopResult:
        """Ends the text: what was held back is text after all."""
        text, self._held = self._held, ""
        return StopResult(text)

    def _advance(self, character: str) -> str | None:
        """Advances by one character; returns the longest stop string that ends here."""
        completed = None
        for index, (text, failure) in enumerate(
            zip(self._stops.texts, self._stops.failures, strict=True)
        ):
            length = self._matched[index]
            while length and text[length] != character:
                length = failure[length - 1]
            if text[length] == character:
                length += 1
            if length == len(text):
                completed = completed or text
                length = failure[length - 1]
            self._matched[index] = length
        return completed

    def _stop(self, text: str, stop: str) -> StopResult:
        self._stopped, self._held = True, ""
        return StopResult(text, stop)
