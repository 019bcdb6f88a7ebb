"""Breaks the control tokens that a text spells out, with a mark that can be taken out again.

Knows nothing of messages and templates.
"""

import re
from collections.abc import Sequence


class Guard:
    """Breaks the control tokens that a message spells out.

    Control tokens of a single character cannot be broken; no known model has one.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        any_token = "|".join(map(re.escape, tokens)) or r"(?!)"
        self.whole = re.compile(any_token)
        # Looking ahead finds occurrences that overlap as well.
        self._broken = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)
        self._tokens = tokens
        self._beginnings = {token[:cut] for token in tokens for cut in range(1, len(token))}
        self._endings = {token[cut:] for token in tokens for cut in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def text(self, text: str, mark: str) -> str:
        """The text of a message with a mark wherever a control token is or could begin or end."""
        if self.whole.search(text):  # this is quick, and looking ahead everywhere is not
            text = self._broken.sub(rf"\g<1>{mark}", text)
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

    def _is_inside(self, inner: str) -> bool:
        return len(inner) < self._longest and any(inner in token for token in self._tokens)
