"""A parser as a machine of states, each of which reads on from a position in the current piece.

Knows no format.
"""

from collections.abc import Callable, Set

from tokenizer_svc.families.segments import Phase, Segment, content

State = Callable[[int], int]


class Machine:
    """A parser whose state reads at least one character, or hands over to another state."""

    phase = Phase.ANSWER

    def __init__(self, state: State) -> None:
        self._state = state
        self._text = ""
        self._start = 0
        self._out: list[Segment] = []

    def push(self, text: str, start: int) -> list[Segment]:
        self._text, self._start, self._out = text, start, []
        position = 0
        while position < len(text):
            position = self._state(position)
        return self._out

    def flush(self, cut: Set[str] = frozenset()) -> list[Segment]:
        self._start, self._text, self._out = self._start + len(self._text), "", []
        self._finish(cut)
        return self._out

    def _finish(self, cut: Set[str]) -> None:
        """Decides what is held; `cut` as for `flush`."""

    def _show(self, text: str, position: int) -> None:
        """`text`, which ends at `position` of the current piece, is content."""
        self._out.extend(content(text, self._start + position - len(text)))

    def _plain(self, position: int) -> int:
        """The state in which all the rest is content."""
        self._show(self._text[position:], len(self._text))
        return len(self._text)
