"""Escapes the control tokens that a text spells out, by a mark that can be taken out again."""

import re
from collections.abc import Callable, Iterator, Sequence

# The lock of the interpreter is held for as long as one search takes.
_STEP_CHARACTERS = 65_536


class ControlTokenEscaper:
    """Puts a mark into every control token that a message spells out.

    Control tokens of a single character cannot be escaped; no known model has one.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        any_token = "|".join(map(re.escape, tokens)) or r"(?!)"
        self._whole = re.compile(any_token)
        # Looking ahead finds occurrences that overlap as well.
        self._broken = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)
        self._tokens = tokens
        self._beginnings = {token[:cut] for token in tokens for cut in range(1, len(token))}
        self._endings = {token[cut:] for token in tokens for cut in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def escaped(self, text: str, mark: str) -> str:
        """The text of a message with a mark wherever a control token is or could begin or end."""
        # The first search is quick, and looking ahead everywhere is not.
        if next(self._found(self._whole, text), None):
            text = self._replaced(self._broken, text, lambda character: character + mark)
        inner = text.strip()
        if not inner:
            return text
        cuts = range(1, min(self._longest, len(inner) + 1))
        # The mark stands next to the text, inside of white space that a template may trim.
        if any(inner[:cut] in self._endings for cut in cuts) or self._is_inside(inner):
            text = text.replace(inner, mark + inner, 1)
        if any(inner[-cut:] in self._beginnings for cut in cuts):
            end = len(text.rstrip())
            text = text[:end] + mark + text[end:]
        return text

    def renamed(self, text: str, name: Callable[[str], str]) -> str:
        """The text with every whole control token replaced by its `name`."""
        return self._replaced(self._whole, text, name)

    def _replaced(self, pattern: re.Pattern[str], text: str, by: Callable[[str], str]) -> str:
        pieces: list[str] = []
        at = 0
        for match in self._found(pattern, text):
            pieces += (text[at : match.start()], by(match[0]))
            at = match.end()
        return "".join((*pieces, text[at:]))

    def _found(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        """What `finditer` finds, step by step, so that other threads have their turn in a text of
        many megabytes."""
        at = 0
        while at < len(text):
            end = at + _STEP_CHARACTERS
            match = pattern.search(text, at, end + self._longest)
            if match is None or match.start() >= end:
                at = end
            elif found := pattern.match(text, match.start()):  # with all of the text behind it
                yield found
                at = found.end()

    def _is_inside(self, inner: str) -> bool:
        return len(inner) < self._longest and any(inner in token for token in self._tokens)
