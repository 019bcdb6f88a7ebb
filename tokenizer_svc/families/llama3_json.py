"""Calls as Llama 3 writes them: an answer that is `{"name": …, "parameters": {…}}`.

It may follow `<|python_tag|>`; further calls are separated by semicolons.
"""

import json
from collections.abc import Set
from typing import Any

from tokenizer_svc.families.call_object import CallObject
from tokenizer_svc.families.lark import Marker, Plan, is_control
from tokenizer_svc.families.parser import StateMachine

TAG = "<|python_tag|>"
MARKERS = frozenset((TAG,))

_BEGINNING = '{"name":"'  # of a call, without white space


def call_rule(name: str, schema: str, marker: Marker) -> str:
    """A call of this function, as a single schema: the answer may have to be JSON too, and a
    grammar can only choose between the two token by token if both are schemas."""
    parameters = _moved(json.loads(schema))
    options = {key: parameters.pop(key) for key in ("x-guidance",) if key in parameters}
    whole = {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
        **options,
    }
    return f"%json {json.dumps(whole)}"


def _moved(schema: Any) -> Any:
    """The schema with its `$ref`s adjusted to its place within the call's schema."""
    if isinstance(schema, list):
        return [_moved(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/properties/parameters{reference[1:]}"
    return moved


def body_rules(plan: Plan, marker: Marker) -> list[str]:
    """Rules for `body`."""
    if not plan.calls:
        return ["body: answer"]
    tag = f"{marker(TAG)}? " if is_control(marker(TAG)) else ""
    calls = f'{tag}call ("; " call)*' if plan.parallel else f"{tag}call"
    if plan.forced:
        return [f"body: {calls}"]
    if plan.answer:
        return [f"body: answer | {calls}"]
    return ["body: UNLIKE_CALL | " + calls, "UNLIKE_CALL: FIRST & /([^{](?s:.*))?/"]


class Llama3JsonParser(StateMachine):
    """Calls, up to the first text that is not a call; from there on all is text."""

    def __init__(self, names: Set[str]) -> None:
        super().__init__(self._between)
        self._names = names
        self._before: list[str] = []  # before the next call: white space, semicolon, tag
        self._tag = 0  # characters matched of the tag
        self._tagged = False
        self._called = False
        self._call: CallObject | None = None

    @property
    def held(self) -> int:
        if self._call is not None and self._call.begun:
            return 0
        return len(self._before) + self._tag + (self._call.length if self._call else 0)

    def _between(self, position: int) -> int:
        """Before the first call or after one."""
        character = self._text[position]
        if not self._tag and (character.isspace() or (self._called and character == ";")):
            self._before.append(character)
            return position + 1
        if not self._tagged and character == TAG[self._tag]:
            self._tag += 1
            if self._tag == len(TAG):
                self._before.extend(TAG)
                self._tag, self._tagged = 0, True
            return position + 1
        if not self._tag and character == "{":
            self._call, self._state = CallObject(self._names), self._in_call
        else:
            self._no_call(position)
        return position

    def _in_call(self, position: int) -> int:
        call = self._call
        assert call is not None, "There is no call to read. This is a bug."
        position = call.feed(self._text, position, self._out)
        if call.done:
            self._before, self._tagged, self._called = [], False, True
            self._call, self._state = None, self._between
        elif call.wrong:
            if not call.begun:
                self._no_call(position, call.raw)
            self._before, self._call, self._state = [], None, self._plain
        return position

    def _no_call(self, position: int, raw: str = "") -> None:
        """What was held back is text, and so is all that follows."""
        self._show("".join(self._before) + TAG[: self._tag] + raw, position)
        self._before, self._tag, self._state = [], 0, self._plain

    def _finish(self, cut: Set[str]) -> None:
        call = self._call
        if call is not None:
            call.flush(self._out)
            if not (call.begun or self._tagged or _begins_call(call.raw)):
                self._no_call(0, call.raw)  # a JSON answer that was cut off
        elif self._tagged or (self._tag and TAG in cut):
            return
        elif not self._called or self._tag:
            self._no_call(0)


def _begins_call(raw: str) -> bool:
    """Whether an object that was cut off begins like a call, with its name."""
    return _BEGINNING.startswith("".join(raw.split())[: len(_BEGINNING)])
