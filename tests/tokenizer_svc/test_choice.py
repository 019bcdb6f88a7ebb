"""Decoding a choice in pieces gives what decoding and searching its whole text gives."""

from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.test_families import read
from tests.tokenizer_svc.test_stop_strings import search
from tokenizer_svc.families.parser import PlainParser
from tokenizer_svc.families.thinking import Thinking, ThinkingParser
from tokenizer_svc.generator.types import (
    Finished,
    GeneratorFinishReason,
    TokenIdLogprobs,
    TokenUpdate,
)
from tokenizer_svc.output.choice import ChoiceDecoder
from tokenizer_svc.output.decoding_options import DecodingOptions
from tokenizer_svc.output.events import Delta, FinishReason
from tokenizer_svc.output.stop import StopStrings
from tokenizer_svc.tokenizer import Tokenizer

TOKENIZER = Tokenizer(byte_level())


def run(
    token_ids: list[int], sizes: list[int], stops: list[str]
) -> tuple[ChoiceDecoder, list[Delta]]:
    """All tokens, in messages of these sizes, then a finish by length."""
    return read_tokens(token_ids, sizes, DecodingOptions(stops=StopStrings(stops)))


def scored(token_ids: list[int], finished: Finished | None = None) -> TokenUpdate:
    entries = tuple(TokenIdLogprobs(-1.0, ()) for _ in token_ids)
    return TokenUpdate(0, tuple(token_ids), entries, finished)


texts = st.text("ab<é\U0001fae0", max_size=12)
stop_lists = st.lists(st.text("ab<é", min_size=1, max_size=3), max_size=2)
sizes = st.lists(st.integers(0, 4), max_size=8)


@given(texts, sizes, stop_lists)
def test_the_text_ends_before_the_first_stop_string(
    text: str, sizes: list[int], stops: list[str]
) -> None:
    """At most one delta per message; the last has the finish reason, and nothing follows."""
    _, deltas = run(TOKENIZER.encode(text), sizes, stops)
    expected, stop = search(text, stops)

    assert expected == "".join(delta.content for delta in deltas)
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [
        True
    ]
    assert stop == deltas[-1].matched_stop
    assert (FinishReason.LENGTH if stop is None else FinishReason.STOP) == deltas[-1].finish_reason


@given(texts, sizes, stop_lists)
def test_logprobs_cover_exactly_the_text(text: str, sizes: list[int], stops: list[str]) -> None:
    """They are never ahead of the text, except for the last token when a stop string cuts it."""
    _, deltas = run(TOKENIZER.encode(text), sizes, stops)
    expected, stop = search(text, stops)
    shown, covered = b"", b""
    for delta in deltas:
        shown += delta.content.encode()
        covered += b"".join(entry.token_bytes for entry in delta.logprobs)

        assert shown.startswith(covered) or (stop is not None and delta in deltas[-2:])
    assert covered.startswith(expected.encode())
    assert stop is not None or covered == text.encode()


@given(texts, sizes, stop_lists)
def test_tokens_after_the_stop_string_do_not_count(
    text: str, sizes: list[int], stops: list[str]
) -> None:
    """Later tokens of the same message do not count."""
    token_ids = TOKENIZER.encode(text)
    choice, _ = run(token_ids, sizes, stops)
    counts = range(1, len(token_ids) + 1)
    stopped = [n for n in counts if search(TOKENIZER.decode(token_ids[:n]), stops)[1] is not None]

    assert (stopped[0] if stopped else len(token_ids)) == choice.completion_tokens


words = st.lists(
    st.sampled_from(["<think>", "</think>", "ab", "b<", "é", "\n", " ", "\U0001fae0"]), max_size=10
).map("".join)


@given(words, sizes, stop_lists, st.booleans())
def test_stop_strings_and_logprobs_skip_the_reasoning(
    text: str, sizes: list[int], stops: list[str], include: bool
) -> None:
    """Stop strings are not searched for in reasoning; log-probabilities cover only the answer."""
    options = DecodingOptions(
        parser=lambda: ThinkingParser(Thinking.POSSIBLE, PlainParser()),
        stops=StopStrings(stops),
        include_stop=include,
    )
    reasoning, content, _ = read(ThinkingParser(Thinking.POSSIBLE, PlainParser()), [text])
    expected, stop = search(content, stops)
    token_ids = TOKENIZER.encode(text)
    choice, deltas = read_tokens(token_ids, sizes, options)
    shown = "".join(delta.content for delta in deltas)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    offsets = [entry.offset for entry in entries]

    assert reasoning == "".join(delta.reasoning for delta in deltas)
    assert expected + (stop or "" if include else "") == shown
    assert stop == choice.matched_stop
    assert shown.encode() in b"".join(entry.token_bytes for entry in entries)
    assert sorted(offsets) == offsets
    assert 0 <= choice.reasoning_tokens <= choice.completion_tokens


@given(words, sizes, stop_lists)
def test_all_counted_tokens_are_returned(text: str, sizes: list[int], stops: list[str]) -> None:
    """With return_token_ids each delta has its tokens: all that count, even if their text is held
    back or cut off by a stop string."""
    options = DecodingOptions(
        parser=lambda: ThinkingParser(Thinking.POSSIBLE, PlainParser()),
        stops=StopStrings(stops),
        return_token_ids=True,
    )
    token_ids = TOKENIZER.encode(text)
    choice, deltas = read_tokens(token_ids, sizes, options)
    found: list[int] = []
    for delta in deltas:
        found += delta.token_ids

        assert token_ids[: delta.completion_tokens] == found
    assert choice.completion_tokens == len(found)


def read_tokens(
    token_ids: list[int], sizes: list[int], options: DecodingOptions
) -> tuple[ChoiceDecoder, list[Delta]]:
    """All tokens, in messages of these sizes, then a finish by length."""
    choice = ChoiceDecoder(0, TOKENIZER, options)
    deltas, rest = [], list(token_ids)
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        deltas.append(choice.push(scored(piece)))
    finished = Finished(GeneratorFinishReason.LENGTH, len(token_ids), 0, 5)
    deltas.append(choice.push(scored(rest, finished)))
    return choice, [delta for delta in deltas if delta is not None]
