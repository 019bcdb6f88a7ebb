"""Calls as Mistral writes them: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`.

Later models write `[TOOL_CALLS]name[ARGS]{…}` instead, once per call.
"""

import re
from collections.abc import Set

from tokenizer_svc.families.call_object import CallObject
from tokenizer_svc.families.json_scan import JsonScan
from tokenizer_svc.families.lark import Marker, Plan, after_opening, literal
from tokenizer_svc.families.marker_search import MarkerSearch
from tokenizer_svc.families.parser import CallArguments, CallStart, StateMachine

OPENING, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
MARKERS = frozenset((OPENING, ARGUMENTS, "[CALL_ID]"))

_MAX_HEAD_LENGTH = 256
_HEAD = re.compile(r"\s*([a-zA-Z0-9_-]+)(?:\[CALL_ID\][a-zA-Z0-9_-]*)?(?:\[ARGS\])?\s*")
# A head that was cut off: the name, and what shows that the name is complete.
_CUT_HEAD = re.compile(r"\s*([a-zA-Z0-9_-]*)((?:\[[A-Z_]*(?:\][a-zA-Z0-9_-]*)?){0,2}\s*)")


def call_rule(name: str, schema: str, marker: Marker) -> str:
    """A call of this function, as an element of the list."""
    before = literal(f'{{"name": "{name}", "arguments": ')
    return f"{before} %json {schema} {literal('}')}"


def named_call_rule(name: str, schema: str, marker: Marker) -> str:
    """A call of this function, as later models write it."""
    return f"{literal(name)} {marker(ARGUMENTS)} %json {schema}"


def body_rules(plan: Plan, marker: Marker) -> list[str]:
    """Rules for `body`."""
    # Older tokenizers put a space after the marker.
    calls = '" "? "[" call (", " call)* "]"' if plan.parallel else '" "? "[" call "]"'
    return _body_rules(plan, marker(OPENING), calls, repeats=False)


def named_body_rules(plan: Plan, marker: Marker) -> list[str]:
    """Rules for `body`, as later models write it."""
    return _body_rules(plan, marker(OPENING), "call", repeats=plan.parallel)


def _body_rules(plan: Plan, opening: str, calls: str, repeats: bool) -> list[str]:
    if not plan.calls:
        return ["body: answer"]
    whole = f"({opening} {calls})+" if repeats else f"{opening} {calls}"
    if plan.forced:
        return [f"body: {whole}"]
    if plan.answer:
        return [f"body: answer | {whole}"]
    return after_opening(opening, calls, repeats)


class MistralParser(StateMachine):
    """Text, then calls after a marker."""

    def __init__(self, names: Set[str]) -> None:
        super().__init__(self._in_text)
        self._names = names
        self._search = MarkerSearch(OPENING)
        self._read: list[str] = []  # since the marker or the last call
        self._length = 0
        self._call: CallObject | None = None
        self._arguments = JsonScan()
        self._called = False  # after this marker
        self._ever_called = False

    @property
    def held(self) -> int:
        if self._state == self._in_text:
            return self._search.held
        if self._called or (self._call is not None and self._call.begun):
            return 0
        pending = 0 if self._call is None else self._call.length
        return len(self._search.dropped) + len(OPENING) + self._length + pending

    def _in_text(self, position: int) -> int:
        shown, after, found = self._search.scan(self._text, position)
        hidden = len(self._search.dropped) + len(OPENING) if found else self._search.held
        self._show(shown, after - hidden)
        if found:
            self._called, self._state = False, self._after_marker
        return after

    def _after_marker(self, position: int) -> int:
        character = self._text[position]
        if character.isspace():
            return self._note(position)
        if character == "[":
            self._state = self._before_call
            return self._note(position)
        self._state = self._in_head
        return position

    def _note(self, position: int) -> int:
        """Keeps a character that comes before a call."""
        self._read.append(self._text[position])
        self._length += 1
        return position + 1

    def _before_call(self, position: int) -> int:
        """Within the list, before an element."""
        character = self._text[position]
        if character.isspace():
            return self._note(position)
        if character != "{":
            return self._give_up(position)
        self._call, self._state = CallObject(self._names), self._in_call
        return position

    def _in_call(self, position: int) -> int:
        call = self._call
        assert call is not None, "There is no call to read. This is a bug."
        position = call.feed(self._text, position, self._out)
        if call.done:
            self._has_called()
            self._call, self._state = None, self._after_call
        elif call.wrong:
            if call.begun:
                self._has_called()
            else:
                self._read.append(call.raw)
            self._call = None
            return self._give_up(position)
        return position

    def _has_called(self) -> None:
        self._called = self._ever_called = True
        self._read, self._length = [], 0

    def _after_call(self, position: int) -> int:
        """Within the list, after an element."""
        character = self._text[position]
        if character.isspace() or character in ",]":
            if not character.isspace():
                self._state = self._before_call if character == "," else self._in_text
            return position + 1
        return self._give_up(position)

    def _in_head(self, position: int) -> int:
        """Reads the name of a call that is not in a list."""
        if self._text[position] != "{" and self._length < _MAX_HEAD_LENGTH:
            return self._note(position)
        head = _HEAD.fullmatch("".join(self._read))
        if self._text[position] != "{" or head is None or head[1] not in self._names:
            return self._give_up(position)
        self._out.append(CallStart(head[1]))
        self._has_called()
        self._arguments, self._state = JsonScan(), self._in_arguments
        return position

    def _in_arguments(self, position: int) -> int:
        after = self._arguments.feed(self._text, position)
        if after > position:
            self._out.append(CallArguments(self._text[position:after]))
        if self._arguments.done or self._arguments.wrong:
            self._state = self._in_text
        return after

    def _give_up(self, position: int) -> int:
        """What follows the marker is text; so is the marker, if there was no call."""
        before = "" if self._called else self._search.dropped + OPENING
        text = before + "".join(self._read)
        self._read, self._length, self._state = [], 0, self._in_text
        self._show(text, position)
        return position

    def _finish(self, cut: Set[str]) -> None:
        if self._state == self._in_text:
            rest = self._search.flush(drop_space=self._ever_called, drop_marker=OPENING in cut)
            self._show(rest, 0)
        elif self._call is not None:
            self._call.flush(self._out)
        elif self._state == self._in_head:
            self._finish_head()

    def _finish_head(self) -> None:
        head = _CUT_HEAD.fullmatch("".join(self._read))
        if head is None:
            self._give_up(0)
        elif head[2] and head[1] in self._names:
            self._out.append(CallStart(head[1]))
