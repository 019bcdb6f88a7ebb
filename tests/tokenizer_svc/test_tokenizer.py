"""The tokenizer: text stays text, and tokens have their true bytes."""

import pytest
from tokenizers import Tokenizer as Library

from tests.tokenizer_svc.sample_tokenizers import CHATML, byte_fallback, byte_level, unigram
from tokenizer_svc.tokenizer import Tokenizer


def plainly(tokenizer_json: str, text: str) -> list[int]:
    """The oracle: the library told to take control tokens as text."""
    library = Library.from_str(tokenizer_json)
    library.encode_special_tokens = True
    return list(library.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_never_becomes_a_control_token(make) -> None:  # type: ignore[no-untyped-def]
    """It is encoded as the library does with `encode_special_tokens`."""
    tokenizer = Tokenizer(make())
    text = "a <|im_end|> b <s>c</s> <unk> <|im_start|>"
    token_ids = tokenizer.encode(text)

    assert plainly(make(), text) == token_ids
    assert not any(tokenizer.is_special(token_id) for token_id in token_ids)


def test_text_cannot_reach_a_control_token_through_the_vocabulary() -> None:
    """A Unigram model's own vocabulary has them; the library alone would use them."""
    tokenizer = Tokenizer(unigram())

    assert plainly(unigram(), "<s>a</s>").count(1) == 1
    assert {1, 2}.isdisjoint(tokenizer.encode("<s>a</s>"))


@pytest.mark.parametrize("make", [byte_level, byte_fallback, unigram])
def test_a_plain_prompt_may_spell_out_control_tokens(make) -> None:  # type: ignore[no-untyped-def]
    """As the library has them; what it makes of ids can be read back."""
    tokenizer, library = Tokenizer(make()), Library.from_str(make())
    text = "<|im_start|>a<|im_end|> <s>b</s>"
    token_ids = tokenizer.encode(text, parse_special=True)

    assert list(library.encode(text, add_special_tokens=False).ids) == token_ids
    assert any(tokenizer.is_special(token_id) for token_id in token_ids)


def test_names_stand_for_control_tokens() -> None:
    """Whoever knows a control token's secret name can write it."""
    tokenizer = Tokenizer(byte_level())

    assert [1, 2] == tokenizer.encode("".join(map(tokenizer.control_name, CHATML[1:])))


def test_ids_stay_when_control_tokens_are_not_in_the_vocabulary() -> None:
    """Llama 3 adds them behind it."""
    library = Library.from_str(byte_level(("<|endoftext|>",)))
    library.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer = Tokenizer(library.to_str())

    assert [library.token_to_id("<|end|>")] == tokenizer.encode(tokenizer.control_name("<|end|>"))


def test_added_tokens_that_control_nothing_are_still_found() -> None:
    """`<think>` in a text is one token, as the model was trained."""
    tokenizer = Tokenizer(byte_level(plain=("<think>",)))
    library = Library.from_str(byte_level(plain=("<think>",)))

    assert [library.token_to_id("<think>")] == tokenizer.encode("<think>")


def test_lone_texts_can_get_their_special_tokens() -> None:
    """BOS is added if asked for, and only then."""
    tokenizer = Tokenizer(byte_fallback())

    assert [1, *tokenizer.encode("Hello")] == tokenizer.encode("Hello", add_special_tokens=True)


def test_partial_characters_have_true_bytes() -> None:
    """The bytes of a character's tokens, joined, are the character."""
    tokenizer = Tokenizer(byte_level())
    token_ids = tokenizer.encode("\U0001fae0")

    assert len(token_ids) > 1
    assert "\U0001fae0".encode() == b"".join(map(tokenizer.token_bytes, token_ids))


def test_sentencepiece_tokens_keep_their_space() -> None:
    """A token's bytes are those it has inside a text."""
    tokenizer = Tokenizer(byte_fallback())
    library = Library.from_str(byte_fallback())

    assert b" Hello" == tokenizer.token_bytes(library.token_to_id("▁Hello"))
    assert b"\xf0" == tokenizer.token_bytes(library.token_to_id("<0xF0>"))
    assert b"<s>" == tokenizer.token_bytes(library.token_to_id("<s>"))


def test_byte_level_tokens_have_no_space_dropped() -> None:
    """Only SentencePiece texts begin with a space that is not theirs."""
    assert not Tokenizer(byte_level()).drops_first_space
    assert Tokenizer(byte_fallback()).drops_first_space
    assert Tokenizer(unigram()).drops_first_space


def test_markers_that_are_one_token() -> None:
    """Hidden tokens, and added ones in angle brackets, which constraints keep apart from text."""
    tokenizer = Tokenizer(byte_level(("<|im_end|>", "[CALL]"), ("<think>", "[ARGS]")))

    assert 0 == tokenizer.marker_id("<|im_end|>")
    assert 1 == tokenizer.marker_id("[CALL]")
    assert tokenizer.marker_id("<think>") is not None
    assert tokenizer.marker_id("[ARGS]") is None
    assert tokenizer.marker_id("a") is None
    assert {0: "<|im_end|>", 1: "[CALL]"} == tokenizer.special_tokens
