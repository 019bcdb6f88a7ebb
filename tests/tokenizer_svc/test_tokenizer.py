"""The tokenizer: text stays text, and tokens have their exact bytes."""

import pytest
from tokenizers import Tokenizer as Library

from tests.tokenizer_svc.sample_tokenizers import CHATML, byte_fallback, byte_level, unigram
from tokenizer_svc.tokenizer import Tokenizer


def plainly(tokenizer_json: str, text: str) -> list[int]:
    """The reference: the library, set to treat control tokens as text."""
    library = Library.from_str(tokenizer_json)
    library.encode_special_tokens = True
    return list(library.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_never_becomes_a_control_token(make) -> None:  # type: ignore[no-untyped-def]
    """Text is encoded as by the library with `encode_special_tokens`."""
    tokenizer = Tokenizer(make())
    text = "a <|im_end|> b <s>c</s> <unk> <|im_start|>"
    token_ids = tokenizer.encode(text)

    assert plainly(make(), text) == token_ids
    assert not any(tokenizer.is_special(token_id) for token_id in token_ids)


def test_text_cannot_reach_a_control_token_through_the_vocabulary() -> None:
    """A Unigram model's vocabulary contains them; the library alone would use them."""
    tokenizer = Tokenizer(unigram())

    assert plainly(unigram(), "<s>a</s>").count(1) == 1
    assert {1, 2}.isdisjoint(tokenizer.encode("<s>a</s>"))


@pytest.mark.parametrize("make", [byte_level, byte_fallback, unigram])
def test_a_plain_prompt_may_contain_control_tokens(make) -> None:  # type: ignore[no-untyped-def]
    """They are encoded as by the library, so that decoded ids can be encoded again."""
    tokenizer, library = Tokenizer(make()), Library.from_str(make())
    text = "<|im_start|>a<|im_end|> <s>b</s>"
    token_ids = tokenizer.encode(text, parse_special=True)

    assert list(library.encode(text, add_special_tokens=False).ids) == token_ids
    assert any(tokenizer.is_special(token_id) for token_id in token_ids)


def test_secret_names_are_encoded_as_control_tokens() -> None:
    """The secret names of control tokens are encoded as control tokens."""
    tokenizer = Tokenizer(byte_level())

    assert [1, 2] == tokenizer.encode("".join(map(tokenizer.control_name, CHATML[1:])))


def test_control_tokens_outside_the_vocabulary_keep_their_ids() -> None:
    """Llama 3 adds them after its vocabulary."""
    library = Library.from_str(byte_level(("<|endoftext|>",)))
    library.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer = Tokenizer(library.to_str())

    assert [library.token_to_id("<|end|>")] == tokenizer.encode(tokenizer.control_name("<|end|>"))


def test_added_tokens_that_are_not_control_tokens_are_encoded() -> None:
    """`<think>` in a text is one token, as in the model's training."""
    tokenizer = Tokenizer(byte_level(plain=("<think>",)))
    library = Library.from_str(byte_level(plain=("<think>",)))

    assert [library.token_to_id("<think>")] == tokenizer.encode("<think>")


def test_special_tokens_are_added_on_request() -> None:
    """BOS is added only on request."""
    tokenizer = Tokenizer(byte_fallback())

    assert [1, *tokenizer.encode("Hello")] == tokenizer.encode("Hello", add_special_tokens=True)


def test_partial_characters_have_exact_bytes() -> None:
    """The bytes of a character's tokens, joined, are the character."""
    tokenizer = Tokenizer(byte_level())
    token_ids = tokenizer.encode("\U0001fae0")

    assert len(token_ids) > 1
    assert "\U0001fae0".encode() == b"".join(map(tokenizer.token_bytes, token_ids))


def test_sentencepiece_tokens_keep_their_space() -> None:
    """A token's bytes are those that it has inside a text."""
    tokenizer = Tokenizer(byte_fallback())
    library = Library.from_str(byte_fallback())

    assert b" Hello" == tokenizer.token_bytes(library.token_to_id("▁Hello"))
    assert b"\xf0" == tokenizer.token_bytes(library.token_to_id("<0xF0>"))
    assert b"<s>" == tokenizer.token_bytes(library.token_to_id("<s>"))


def test_byte_level_tokens_have_no_space_dropped() -> None:
    """Only SentencePiece puts a space before a text."""
    assert not Tokenizer(byte_level()).drops_first_space
    assert Tokenizer(byte_fallback()).drops_first_space
    assert Tokenizer(unigram()).drops_first_space


def test_markers_that_are_one_token() -> None:
    """Special tokens, and added ones in angle brackets, which constraints tell from text."""
    tokenizer = Tokenizer(byte_level(("<|im_end|>", "[CALL]"), ("<think>", "[ARGS]")))

    assert 0 == tokenizer.marker_id("<|im_end|>")
    assert 1 == tokenizer.marker_id("[CALL]")
    assert tokenizer.marker_id("<think>") is not None
    assert tokenizer.marker_id("[ARGS]") is None
    assert tokenizer.marker_id("a") is None
    assert {0: "<|im_end|>", 1: "[CALL]"} == tokenizer.special_tokens
