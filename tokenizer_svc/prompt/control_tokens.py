"""Escapes the control tokens that a text spells out, with a mark that can be removed again."""

import re
from collections.abc import Callable, Iterator, Sequence

# One search holds the GIL for as long as it takes.
_STEP_CHARACTERS = 65_536


class ControlTokenEscaper:
    """Puts a mark into every control token that a message spells out.

    Control tokens of a single character cannot be escaped; no known model has one.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        any_token = "|".join(map(re.escape, tokens)) or r"(?!)"
        self._whole = re.compile(any_token)
        # A lookahead finds overlapping occurrences as well.
        self._broken = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)
        self._tokens = tokens
        self._beginnings = {token[:cut] for token in tokens for cut in range(1, len(token))}
        self._endings = {token[cut:] for token in tokens for cut in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def escaped(self, text: str, mark: str) -> str:
        """A message's text with a mark wherever a control token is or could begin or end."""
        # This first search is fast, which the lookahead is not.
        if next(self._found(self._whole, text), None):
            text = self._replaced(self._broken, text, lambda character: character + mark)
        inner = text.strip()
        if not inner:
            return text
        cuts = range(1, min(self._longest, len(inner) + 1))
        # The mark is next to the text, inside any white space that a template may trim.
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
        """Like `finditer`, but in steps, so that other threads can run during the search of a text
        of many megabytes."""
        at = 0
        while at < len(text):
            end = at + _STEP_CHARACTERS
            match = pattern.search(text, at, end + self._longest)
            if match is None or match.start() >= end:
                at = end
            elif found := pattern.match(text, match.start()):  # now against the whole text
                yield found
                at = found.end()

    def _is_inside(self, inner: str) -> bool:
        return len(inner) < self._longest and any(inner in token for token in self._tokens)
