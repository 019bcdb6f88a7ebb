"""Parsers of model output: their protocol, the segments they emit, and a state machine for them."""

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
    """New text of a channel; `start` is its offset in the whole output, in characters."""

    channel: Channel
    text: str
    start: int


@dataclass(frozen=True)
class CallStart:
    """A call of this function begins."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next characters of the current call's arguments."""

    text: str


Segment = Text | CallStart | CallArguments


class Phase(Enum):
    """The part of an answer that a parser is in."""

    UNDECIDED = "undecided"  # the output so far may yet open the reasoning
    REASONING = "reasoning"
    ANSWER = "answer"


class Parser(Protocol):
    """Splits a model's output into segments. The joined result does not depend on how the output is
    cut into pieces; time is linear in its length."""

    def push(self, text: str, start: int) -> list[Segment]:
        """Takes the next piece, which begins at offset `start` of the whole output."""

    def flush(self, cut: Set[str] = frozenset()) -> list[Segment]:
        """Ends the output and resolves what was held back.

        An incomplete call is emitted as far as it goes if its name is known, and dropped otherwise.
        `cut` are the markers that may have been cut off: if the output ends with the beginning of
        one of them, that is not text.
        """

    @property
    def held(self) -> int:
        """Number of trailing characters that are not resolved yet."""

    @property
    def phase(self) -> Phase:
        """The part of the answer that it is in."""

    @property
    def may_reason(self) -> bool:
        """Whether it is in a phase other than the answer, or may enter one again."""


class PlainParser:
    """The parser of a format without markers: all output is content."""

    held = 0
    phase = Phase.ANSWER
    may_reason = False

    def push(self, text: str, start: int) -> list[Segment]:
        return content(text, start)

    def flush(self, cut: Set[str] = frozenset()) -> list[Segment]:
        return []


def content(text: str, start: int) -> list[Segment]:
    """A content segment of `text`, if there is any."""
    return [Text(Channel.CONTENT, text, start)] if text else []


State = Callable[[int], int]


class StateMachine:
    """A parser as a state machine.

    A state reads from a position in the current piece and returns where it stopped: it reads at
    least one character or switches to another state.
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
        """Resolves what was held back; `cut` is that of `flush`."""

    def _show(self, text: str, position: int) -> None:
        """Emits `text`, which ends at `position` of the current piece, as content."""
        self._out.extend(content(text, self._start + position - len(text)))

    def _plain(self, position: int) -> int:
        """The state in which all that follows is content."""
        self._show(self._text[position:], len(self._text))
        return len(self._text)
