"""Calls as Hermes and Qwen write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from collections.abc import Set

from tokenizer_svc.families.call_object import CallObject
from tokenizer_svc.families.lark import Marker, Plan, after_opening, literal
from tokenizer_svc.families.marker_search import MarkerSearch
from tokenizer_svc.families.parser import StateMachine

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MARKERS = frozenset((OPENING, CLOSING))


def call_rule(name: str, schema: str, marker: Marker) -> str:
    """A call of this function, after the opening marker."""
    before = literal(f'\n{{"name": "{name}", "arguments": ')
    return f"{before} %json {schema} {literal('}' + chr(10))} {marker(CLOSING)}"


def body_rules(plan: Plan, marker: Marker) -> list[str]:
    """Rules for `body`."""
    opening = marker(OPENING)
    if not plan.calls:
        return ["body: answer"]
    calls = f'{opening} call ("\\n" {opening} call)*' if plan.parallel else f"{opening} call"
    if plan.forced:
        return [f"body: {calls}"]
    if plan.answer:
        return [f"body: answer | {calls}"]
    return after_opening(opening, "call", repeats=plan.parallel)


class HermesParser(StateMachine):
    """Text with calls between markers."""

    def __init__(self, names: Set[str]) -> None:
        super().__init__(self._in_text)
        self._names = names
        self._search = MarkerSearch(OPENING)
        self._call: CallObject | None = None
        self._after_call: list[str] = []  # white space after the object
        self._closed = 0  # characters matched of the closing marker
        self._called = False

    @property
    def held(self) -> int:
        if self._call is not None:
            pending = len(self._search.dropped) + len(OPENING) + self._call.length
            return 0 if self._call.begun else pending
        return self._search.held + len(self._after_call) + self._closed

    def _pending_text(self, call: CallObject) -> str:
        """What was read of an object that may not be a call."""
        return self._search.dropped + OPENING + call.raw

    def _in_text(self, position: int) -> int:
        shown, after, found = self._search.scan(self._text, position)
        hidden = len(self._search.dropped) + len(OPENING) if found else self._search.held
        self._show(shown, after - hidden)
        if found:
            self._call, self._state = CallObject(self._names), self._in_call
        return after

    def _in_call(self, position: int) -> int:
        call = self._call
        assert call is not None, "There is no call to read. This is a bug."
        position = call.feed(self._text, position, self._out)
        if call.done:
            self._called = True
            self._call, self._state = None, self._in_closing
        elif call.wrong:
            if not call.begun:
                self._show(self._pending_text(call), position)
            self._called = self._called or call.begun
            self._call, self._state = None, self._in_text
        return position

    def _in_closing(self, position: int) -> int:
        character = self._text[position]
        if not self._closed and character.isspace():
            self._after_call.append(character)
            return position + 1
        if character == CLOSING[self._closed]:
            self._closed += 1
            if self._closed == len(CLOSING):
                self._after_call, self._closed, self._state = [], 0, self._in_text
            return position + 1
        self._no_closing(position)
        return position

    def _no_closing(self, position: int) -> None:
        """What follows the call is text, and may open the next call."""
        rest = "".join(self._after_call) + CLOSING[: self._closed]
        self._after_call, self._closed, self._state = [], 0, self._in_text
        shown, _, _ = self._search.scan(rest, 0)
        self._show(shown, position - self._search.held)

    def _finish(self, cut: Set[str]) -> None:
        if self._call is not None:
            self._call.flush(self._out)
        elif self._state == self._in_closing:
            self._after_call, self._closed = [], 0
        else:
            rest = self._search.flush(drop_space=self._called, drop_marker=OPENING in cut)
            self._show(rest, 0)
