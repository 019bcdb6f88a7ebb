"""Text to token ids and ids to bytes: the only module that imports the `tokenizers` library.

A control token is one that tokenizer.json marks as special, or an added one of the form <|…|>:
DeepSeek's turns begin with such tokens, not marked as special.

Control tokens are kept apart from text by their names: the encoder is the model's own tokenizer
with every control token renamed to a secret of this process. Text cannot spell such a name, whether
through an added token, a vocabulary entry or normalization, so a message's text is always text; to
get a control token, write its `control_name`. In a plain prompt, by contrast, control tokens that
are spelled out are intended.
"""

import json
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer as _Library

_CONTROL_FORM = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_CHARACTERS_PER_TOKEN = 8  # twice the average of most languages
_CUT_TOLERANCE = 64  # tokens


class TooManyTokens(Exception):
    """A text has more tokens than allowed."""


class Tokenizer:
    """The tokenizer of one model. All methods may be called from any thread."""

    def __init__(self, tokenizer_json: str) -> None:
        definition = json.loads(tokenizer_json)
        added = definition.get("added_tokens", ())
        decoders = set(_types(definition.get("decoder")))
        self._plain = _load(tokenizer_json)
        self._names = _secret_names([t["content"] for t in added if _is_control(t)])
        self._encoder = _load(json.dumps(_renamed(definition, self._names)))
        self._special_ids = frozenset(token["id"] for token in added if token["special"])
        self._marker_ids = {t["content"]: t["id"] for t in added if _is_marker(t)}
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        vocabulary = self._plain.get_vocab()
        self.max_token_characters = max(map(len, vocabulary), default=1)
        self._anchor = None if self._byte_level else _find_anchor(self._plain, vocabulary)
        self.drops_first_space = not self._byte_level and self._first_space_is_lost(vocabulary)
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The text of every control token."""
        return tuple(self._names)

    def control_name(self, control_token: str) -> str:
        """The name in a text that `encode` turns into this control token."""
        return self._names[control_token]

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of a model's answer: those marked as special are."""
        return token_id in self._special_ids

    def marker_id(self, text: str) -> int | None:
        """The id of the single token that is a format's marker; None if there is none.

        Only tokens that constraints do not take for text: hidden ones, and added ones in <…>.
        """
        return self._marker_ids.get(text)

    @property
    def special_tokens(self) -> dict[int, str]:
        """The text of every hidden token, by id."""
        return {token_id: self._plain.id_to_token(token_id) for token_id in self._special_ids}

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them; empty for an id that is not a token."""
        return [self._plain.id_to_token(token_id) or "" for token_id in token_ids]

    def encode(
        self,
        text: str,
        add_special_tokens: bool = False,
        max_tokens: int | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """Ids of `text`, in which only `control_name`s are control tokens; with `parse_special`,
        only those that are spelled out.

        `add_special_tokens` adds what the tokenizer puts around a text, such as BOS. Of a text that
        is much too long, the beginning is encoded first, and TooManyTokens raised if that alone has
        more than `max_tokens`.
        """
        library = self._plain if parse_special else self._encoder
        if max_tokens is not None and len(text) > max_tokens * _CHARACTERS_PER_TOKEN:
            beginning = text[: max_tokens * _CHARACTERS_PER_TOKEN]
            # Around the cut there may be a few tokens that the whole text does not have.
            if len(_encoding(library, beginning, add_special_tokens)) > max_tokens + _CUT_TOLERANCE:
                raise TooManyTokens
        ids: list[int] = _encoding(library, text, add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids, control tokens included; invalid bytes become U+FFFD."""
        [text] = self._plain.decode_batch([token_ids], skip_special_tokens=False)
        return str(text)

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token within a text; empty for an id that is not a token."""
        token: str | None = self._plain.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return _byte_level_bytes(token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._anchor is None or token_id in self._special_ids:
            return token.encode()
        # A token's text depends on its position, so it is decoded after another token.
        before, both = self.decode([self._anchor]), self.decode([self._anchor, token_id])
        return both[len(before) :].encode()

    def _first_space_is_lost(self, vocabulary: dict[str, int]) -> bool:
        """Whether decoding drops the space that SentencePiece puts before every text."""
        for token, token_id in vocabulary.items():
            if token[:1] == "\u2581" != token[1:2]:
                inside = self._token_bytes(token_id)
                alone = self.decode([token_id])
                return inside[:1] == b" " and alone[:1] != " "
        return False


def _encoding(library: _Library, text: str, add_special_tokens: bool) -> Any:
    # Only the library's batch methods release the GIL.
    [encoding] = library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding


def _load(definition: str) -> _Library:
    library = _Library.from_str(definition)
    library.no_truncation()
    library.no_padding()
    return library


def _is_control(added_token: dict[str, Any]) -> bool:
    return bool(added_token["special"] or _CONTROL_FORM.fullmatch(added_token["content"]))


def _is_marker(added_token: dict[str, Any]) -> bool:
    text = added_token["content"]
    return bool(added_token["special"] or (text.startswith("<") and text.endswith(">")))


def _secret_names(control_tokens: list[str]) -> dict[str, str]:
    secret = secrets.token_hex(8)
    return {token: f"\ufdd0{secret}:{index}\ufdd1" for index, token in enumerate(control_tokens)}


def _renamed(definition: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """tokenizer.json with control tokens renamed wherever text could match them; ids are kept."""
    model = dict(definition["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    elif "vocab" in model:  # Unigram: pairs of token and score, in the order of ids
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [m for m in model["merges"] if not _involves(m, names)]
    added = [
        token | {"content": names[token["content"]], "normalized": False, "single_word": False}
        if token["content"] in names
        else token
        for token in definition.get("added_tokens", ())
    ]
    return definition | {"model": model, "added_tokens": added}


def _involves(merge: str | list[str], names: dict[str, str]) -> bool:
    """Whether a BPE merge produces or uses a control token."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _types(decoder: dict[str, Any] | None) -> list[str]:
    """The types of a decoder and of all its parts."""
    if decoder is None:
        return []
    return [decoder["type"], *(kind for d in decoder.get("decoders", ()) for kind in _types(d))]


def _find_anchor(library: _Library, vocabulary: dict[str, int]) -> int | None:
    """A token with visible text that decodes to the same text whatever follows it."""
    for token, token_id in vocabulary.items():
        if token.isascii() and token.isalpha():
            alone = library.decode([token_id], skip_special_tokens=False)
            twice = library.decode([token_id, token_id], skip_special_tokens=False)
            if alone and twice.startswith(alone) and len(twice) > len(alone):
                return token_id
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters are their own byte, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """A token outside the alphabet, such as an added one with a space, is taken as plain text."""
    try:
        return bytes([_BYTE_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()
