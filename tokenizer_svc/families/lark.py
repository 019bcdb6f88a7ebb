"""Pieces of a grammar in llguidance's variant of Lark."""

import json
from collections.abc import Callable
from dataclasses import dataclass

# Any text; a control token is none.
ANYTHING = "/(?s:.*)/"

# How a grammar writes a marker of a format: a control token's id, or else its letters.
Marker = Callable[[str], str]


@dataclass(frozen=True)
class Plan:
    """What an answer may consist of, as a format has to wrap it.

    With `calls` there is a rule `call`, a call of any of the tools, and with `forced` there has to
    be one; `parallel` allows more. With `answer` there is a rule of that name for the text; without
    it any text will do, and the terminals are TEXT, and FIRST for text that begins the answer.
    """

    calls: bool = False
    forced: bool = False
    parallel: bool = False
    answer: bool = False


def literal(text: str) -> str:
    """A text as it is."""
    return json.dumps(text)


def is_control(marker: str) -> bool:
    """Whether a written marker is a control token, which no text can spell."""
    return marker.startswith("<[")


def after_opening(opening: str, calls: str, repeats: bool) -> list[str]:
    """Rules of `body` for free text in which `calls` must follow wherever `opening` appears."""
    again = f"({opening} {calls} TEXT)*" if repeats else f"({opening} {calls})?"
    if is_control(opening):
        return [f"body: FIRST {again}"]
    if not repeats:
        return [f"body: opened {calls} | FIRST", f"opened[lazy]: FIRST {opening}"]
    return [
        f"body: opened {calls} (opened_again {calls})* TEXT | FIRST",
        f"opened[lazy]: FIRST {opening}",
        f"opened_again[lazy]: TEXT {opening}",
    ]
