"""The one JSON encoder: compact text whose strings contain no line terminators of any kind."""

from collections.abc import Mapping
from json import JSONEncoder
from typing import Any

# Legal in JSON and within a line of an event, but some clients split lines at them.
_LINE_TERMINATORS = {"\x85": r"\u0085", "\u2028": r"\u2028", "\u2029": r"\u2029"}
_ENCODER = JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_json(value: Any) -> str:
    """`value` as JSON, with keys in order; raises ValueError for NaN and infinities."""
    text = _ENCODER.encode(value)
    if not text.isascii():
        # str.translate takes a hundred times as long.
        for character, escaped in _LINE_TERMINATORS.items():
            text = text.replace(character, escaped)
    return text


def encode(value: Any) -> bytes:
    """The same in UTF-8."""
    return to_json(value).encode()


def encode_answer(answer: Mapping[str, Any]) -> bytes:
    """An answer with choices; other threads can run after each, as the encoder holds the GIL."""
    before, field, after = to_json({**answer, "choices": []}).partition('"choices":[')
    choices = [to_json(choice) for choice in answer["choices"]]
    return "".join((before, field, ",".join(choices), after)).encode()
