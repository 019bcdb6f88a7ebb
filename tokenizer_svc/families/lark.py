"""Building blocks of grammars in llguidance's variant of Lark."""

import json
from collections.abc import Callable
from dataclasses import dataclass

# Any text, but no control tokens.
ANYTHING = "/(?s:.*)/"

# Writes a format's marker for the grammar: as a control token's id, or else as literal text.
Marker = Callable[[str], str]


@dataclass(frozen=True)
class Plan:
    """What an answer may consist of, for which a format writes its grammar rules.

    With `calls` there is a rule `call`, a call of any of the tools; `forced` requires a call, and
    `parallel` allows several. With `answer` there is a rule of that name for the text; without it
    any text is allowed, through the terminals TEXT, and FIRST for text that begins the answer.
    """

    calls: bool = False
    forced: bool = False
    parallel: bool = False
    answer: bool = False


def literal(text: str) -> str:
    """A literal string in a grammar."""
    return json.dumps(text)


def is_control(marker: str) -> bool:
    """Whether a marker is written as a control token, which no text can spell."""
    return marker.startswith("<[")


def after_opening(opening: str, calls: str, repeats: bool) -> list[str]:
    """Rules for `body`: free text in which `calls` must follow wherever `opening` appears."""
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
