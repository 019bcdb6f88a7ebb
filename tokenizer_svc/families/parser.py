"""Parsers of a model's output: their protocol, the segments they make, a state machine for them."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Channel(Enum):
    """Which field of the answer a text belongs to."""

    CONTENT = "content"
    REASONING = "reasoning"


@dataclass(frozen=True)
class Text:
    """New text of a channel; its first character is at `start` of all that was parsed."""

    channel: Channel
    text: str
    start: int


@dataclass(frozen=True)
class CallStart:
    """A call of this function begins."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next characters of the arguments of the call that began last."""

    text: str


Segment = Text | CallStart | CallArguments


class Phase(Enum):
    """Where in an answer a parser is."""

    UNDECIDED = "undecided"  # what has come may yet turn out to open the reasoning
    REASONING = "reasoning"
    ANSWER = "answer"


class Parser(Protocol):
    """Splits a model's output. However the output is cut into pieces, the joined result is the
    same; time is linear in its length."""

    def push(self, text: str, start: int) -> list[Segment]:
        """Takes the next piece, whose first character is at `start` of the whole."""

    def flush(self, cut: Set[str] = frozenset()) -> list[Segment]:
        """Nothing more comes: what was held back is decided.

        A call that is not complete is reported as far as it goes once its name is known, and
        dropped before. `cut` are the markers that may have been cut off: if the output ends with
        the beginning of one of them, that is no text.
        """

    @property
    def held(self) -> int:
        """How many characters at the end are not decided yet."""

    @property
    def phase(self) -> Phase:
        """Where in the answer it is."""

    @property
    def may_reason(self) -> bool:
        """Whether it is in a phase other than the answer, or may come into one again."""


class Plain:
    """The parser of a format without anything special: all is content."""

    held = 0
    phase = Phase.ANSWER
    may_reason = False

    def push(self, text: str, start: int) -> list[Segment]:
        return content(text, start)

    def flush(self, cut: Set[str] = frozenset()) -> list[Segment]:
        return []


def content(text: str, start: int) -> list[Segment]:
    """Text for the caller, if there is any."""
    return [Text(Channel.CONTENT, text, start)] if text else []


State = Callable[[int], int]


class Machine:
    """A parser as a state machine.

    The state reads on from a position in the current piece: at least one character, or it hands
    over to another state.
    """

    phase = Phase.ANSWER

    @property
    def may_reason(self) -> bool:
        return self.phase is not Phase.ANSWER

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
