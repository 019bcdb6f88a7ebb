"""Detokenizes incrementally: whole characters, each as soon as its last byte has arrived.

The joined output equals that of decoding all ids at once. Special tokens have no text, except those
that a parser has to see.
"""

import codecs
from collections.abc import Collection, Set

from tokenizer_svc.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one choice. Special tokens show if in `markers`, or all of them with `show_special`.

    SentencePiece begins every text with a space that decoding drops. If the text `continues`
    another one, the space is kept between the two.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        markers: Set[str] = frozenset(),
        show_special: bool = False,
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._markers = {marker.encode() for marker in markers}
        self._show_special = show_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.drops_first_space and not continues

    @property
    def pending(self) -> bool:
        """Whether the first bytes of a character are waiting for the rest."""
        return bool(self._decoder.getstate()[0])

    def leaves_incomplete(self, token_id: int) -> bool:
        """Whether this token, coming next, leaves pending bytes incomplete.

        They then become one U+FFFD, which is emitted with this token's text but precedes it.
        """
        token = self._tokenizer.token_bytes(token_id)
        is_shown = not self._tokenizer.is_special(token_id) or self._shows(token)
        return self.pending and is_shown and bool(token) and not 0x80 <= token[0] < 0xC0

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" if none."""
        return self.push_all((token_id,))

    def push_all(self, token_ids: Collection[int]) -> str:
        """The characters that these tokens complete together."""
        token_bytes, is_special = self._tokenizer.token_bytes, self._tokenizer.is_special
        pieces = [
            token
            for token_id, token in zip(token_ids, map(token_bytes, token_ids), strict=True)
            if not is_special(token_id) or self._shows(token)
        ]
        return self._first(self._decoder.decode(b"".join(pieces)))

    def flush(self) -> str:
        """Ends the text: bytes that never became a character are U+FFFD."""
        return self._first(self._decoder.decode(b"", final=True))

    def _shows(self, token: bytes) -> bool:
        return self._show_special or token in self._markers

    def _first(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
