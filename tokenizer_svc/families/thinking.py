"""Reasoning as DeepSeek-R1 and Qwen3 write it: `<think>…</think>` before the answer.

The answer itself is handled by another parser.
"""

import re
from collections.abc import Set
from enum import Enum

from tokenizer_svc.families.lark import Marker, is_control
from tokenizer_svc.families.marker_search import MarkerSearch
from tokenizer_svc.families.parser import Channel, Parser, Phase, StateMachine, Text

OPENING, CLOSING = "<think>", "</think>"
MARKERS = frozenset((OPENING, CLOSING))


class Thinking(Enum):
    """Where the model's output begins, judging by the prompt."""

    POSSIBLE = "possible"  # the model may begin with the opening marker
    OPENED = "opened"  # the prompt ends with it
    DONE = "done"  # the prompt ends with the closing marker


_OPENED = re.compile(r"<think>\s*\Z")
_CLOSED = re.compile(r"</think>\s*\Z")


def thinking_after(prompt: str, continued_text: str = "") -> Thinking:
    """Where output after this prompt begins; `continued_text` is the message that it continues."""
    if continued_text:
        unclosed = continued_text.rfind(OPENING) > continued_text.rfind(CLOSING)
        return Thinking.OPENED if unclosed else Thinking.DONE
    if _CLOSED.search(prompt, max(0, len(prompt) - 100)):
        return Thinking.DONE
    opened = _OPENED.search(prompt, max(0, len(prompt) - 100))
    return Thinking.OPENED if opened else Thinking.POSSIBLE


def start_rules(thinking: Thinking, marker: Marker, gap: bool) -> list[str]:
    """Rules for `start`, with the reasoning before `body`, and for FIRST.

    `gap` is whether white space between the two has to be allowed.
    """
    if thinking is Thinking.DONE:
        return ["start: body", "FIRST: TEXT"]
    opening, closing = marker(OPENING), marker(CLOSING)
    first = "FIRST: TEXT" if is_control(opening) else r"FIRST: TEXT & ~/\s*<think>(?s:.*)/"
    thought = "thought GAP? body" if gap else "thought body"
    start = f"start: {thought}" if thinking is Thinking.OPENED else f"start: body | {thought}"
    opens = "" if thinking is Thinking.OPENED else opening
    if is_control(closing):
        rule = f"thought: {opens} TEXT {closing}"
    else:
        before = "" if thinking is Thinking.OPENED else r"\s*<think>"
        rule = rf"thought[lazy]: /{before}(?s:.*)<\/think>/"
    return [start, rule, first, r"GAP: /\s{1,4}/"]


class ThinkingParser(StateMachine):
    """Splits off the reasoning; white space around it is dropped."""

    def __init__(self, thinking: Thinking, answer: Parser) -> None:
        done = thinking is Thinking.DONE
        super().__init__(self._in_answer if done else self._at_start)
        self.phase = Phase.ANSWER if done else Phase.UNDECIDED
        self._thinking = thinking
        self._answer = answer
        self._before: list[str] = []  # white space before the opening marker
        self._opening = 0  # characters matched of the marker
        self._search = MarkerSearch(CLOSING)

    @property
    def held(self) -> int:
        if self._state == self._in_answer:
            return self._answer.held
        return len(self._before) + self._opening + self._search.held

    def _at_start(self, position: int) -> int:
        character = self._text[position]
        if not self._opening and character.isspace():
            self._before.append(character)
            return position + 1
        if character == OPENING[self._opening]:
            self._opening += 1
            if self._opening == len(OPENING):
                self._before, self._opening = [], 0
                self.phase, self._state = Phase.REASONING, self._before_reasoning
            return position + 1
        return self._no_opening(position)

    def _no_opening(self, position: int) -> int:
        """What was held back is reasoning if the prompt opened it, or else part of the answer."""
        start = self._start + position - len(self._before) - self._opening
        space, opening = "".join(self._before), OPENING[: self._opening]
        self._before, self._opening = [], 0
        if self._thinking is Thinking.OPENED:
            self.phase, self._state = Phase.REASONING, self._in_reasoning
            shown, _, _ = self._search.scan(opening, 0)
            self._reasoning(shown, position - self._search.held)
        else:
            self.phase, self._state = Phase.ANSWER, self._in_answer
            self._out.extend(self._answer.push(space + opening, start))
        return position

    def _before_reasoning(self, position: int) -> int:
        if self._text[position].isspace():
            return position + 1
        self._state = self._in_reasoning
        return position

    def _in_reasoning(self, position: int) -> int:
        shown, after, found = self._search.scan(self._text, position)
        hidden = len(self._search.dropped) + len(CLOSING) if found else self._search.held
        self._reasoning(shown, after - hidden)
        if found:
            self.phase, self._state = Phase.ANSWER, self._before_answer
        return after

    def _reasoning(self, text: str, position: int) -> None:
        if text:
            start = self._start + position - len(text)
            self._out.append(Text(Channel.REASONING, text, start))

    def _before_answer(self, position: int) -> int:
        if self._text[position].isspace():
            return position + 1
        self._state = self._in_answer
        return position

    def _in_answer(self, position: int) -> int:
        self._out.extend(self._answer.push(self._text[position:], self._start + position))
        return len(self._text)

    def _finish(self, cut: Set[str]) -> None:
        if self._opening and OPENING in cut:
            self._before, self._opening = [], 0
        elif self._state == self._at_start:
            self._no_opening(0)
        if self.phase is Phase.REASONING:
            rest = self._search.flush(drop_space=False, drop_marker=CLOSING in cut)
            self._reasoning(rest, 0)
        self._out.extend(self._answer.flush(cut))
