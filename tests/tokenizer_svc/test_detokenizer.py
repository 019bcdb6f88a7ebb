"""Incremental decoding gives what decoding everything at once gives."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer_svc.sample_tokenizers import byte_fallback, byte_level, unigram
from tokenizer_svc.output.detokenizer import Detokenizer
from tokenizer_svc.tokenizer import Tokenizer

TEXTS = [
    "plain words",
    "\U0001fae0 melts",
    "\U0001f979",
    "\u9f9c and \u9f9c",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466!",
    "e\u0301 a\u0308 n\u0303 combining",
    "日本語の文章と한국어",
    "\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7",
    " leading and trailing ",
    "  two\n\nlines\t",
    "\u200d\ufe0f\ufeff",
]

KINDS = {
    "byte level": Tokenizer(byte_level()),
    "byte fallback": Tokenizer(byte_fallback()),
}


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_have_whole_characters(kind: str, text: str) -> None:
    """No piece has a replacement character, and joined they equal the text decoded at once."""
    tokenizer = KINDS[kind]
    token_ids = tokenizer.encode(text)
    found = pieces(tokenizer, token_ids)

    assert tokenizer.decode(token_ids) == "".join(found)
    assert text == "".join(found)
    assert "\ufffd" not in "".join(found)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_characters="▁", codec="utf-8"), max_size=30))
def test_any_text_round_trips(kind: str, text: str) -> None:
    """This includes text that nobody would write, except SentencePiece's own space character."""
    tokenizer = KINDS[kind]

    assert text == "".join(pieces(tokenizer, tokenizer.encode(text)))


@given(token_ids=st.lists(st.integers(3, 480), max_size=30))
def test_incremental_decoding_equals_decoding_at_once(token_ids: list[int]) -> None:
    """Bytes that are not valid characters show as they do when decoded at once."""
    tokenizer = KINDS["byte level"]

    assert tokenizer.decode(token_ids) == "".join(pieces(tokenizer, token_ids))


def test_a_character_is_shown_with_its_last_byte() -> None:
    """Only an incomplete character is held back."""
    tokenizer = KINDS["byte fallback"]
    emoji = "\U0001fae0".encode()
    token_ids = [3 + byte for byte in emoji]

    assert ["", "", "", "\U0001fae0", ""] == pieces(tokenizer, token_ids)


def test_only_the_first_space_of_a_sentencepiece_text_is_dropped() -> None:
    """Words keep the spaces between them."""
    tokenizer = KINDS["byte fallback"]
    token_ids = tokenizer.encode("Hello world world")

    assert "Hello world world" == "".join(pieces(tokenizer, token_ids))


def test_unigram_with_metaspace() -> None:
    """The same holds for the Metaspace decoder."""
    tokenizer = Tokenizer(unigram())
    token_ids = tokenizer.encode("a b cd")

    assert tokenizer.decode(token_ids) == "".join(pieces(tokenizer, token_ids)) == "a b cd"


def test_control_tokens_have_no_text() -> None:
    """Control tokens are skipped, even in the middle of a character."""
    tokenizer = KINDS["byte level"]
    first, *rest = tokenizer.encode("\U0001fae0")

    assert "\U0001fae0" == "".join(pieces(tokenizer, [2, first, 2, *rest, 0]))


def test_incomplete_bytes_at_the_end_become_a_replacement_character() -> None:
    """An incomplete character at the end becomes one replacement character."""
    tokenizer = KINDS["byte level"]
    token_ids = tokenizer.encode("a\U0001fae0")[:-1]

    assert "a\ufffd" == "".join(pieces(tokenizer, token_ids))


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """Models pad their vocabulary; such ids decode to nothing."""
    assert ["", ""] == pieces(KINDS["byte level"], [99_999])


def test_control_tokens_can_be_shown() -> None:
    """Control tokens are shown if they are a parser's markers, or if the caller asks for all."""
    tokenizer = KINDS["byte level"]
    token_ids = [1, *tokenizer.encode("a"), 2]

    def text(**more: Any) -> str:
        detokenizer = Detokenizer(tokenizer, **more)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    assert "a" == text()
    assert "<|im_start|>a" == text(markers={"<|im_start|>", "<tool_call>"})
    assert "<|im_start|>a<|im_end|>" == text(show_special=True)
