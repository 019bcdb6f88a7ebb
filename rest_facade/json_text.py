"""JSON as it leaves the facade: compact UTF-8 whose strings hold no line end of any kind."""

import json
from json.encoder import encode_basestring
from typing import Any

from starlette.responses import Response

# Legal in JSON and in a line of an event, but some clients take them for the line's end.
_LINE_ENDS = str.maketrans({"\x85": r"\u0085", "\u2028": r"\u2028", "\u2029": r"\u2029"})


def json_string(text: str) -> str:
    """`text` as a JSON string, quotes included."""
    return _one_line(encode_basestring(text))


def encode(body: Any) -> bytes:
    """`body` as JSON; raises ValueError for numbers that JSON does not have."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _one_line(text).encode()


def _one_line(text: str) -> str:
    return text if text.isascii() else text.translate(_LINE_ENDS)


class JSONAnswer(Response):
    """A success, as JSON."""

    media_type = "application/json"
