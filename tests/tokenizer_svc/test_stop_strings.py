"""The stop matcher finds what a search of the whole text finds."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenizer_svc.output.stop import StopMatcher, StopResult, StopStrings


def search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The reference: the text before the match that ends first; on ties, the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


def feed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(StopStrings(stops))
    shown = ""
    for piece in pieces:
        result = matcher.push(piece)
        shown += result.text
        if result.stop is not None:
            return shown, result.stop
    return shown + matcher.flush().text, None


few_letters = st.text("ab<", max_size=14)
stop_lists = st.lists(st.text("ab<", min_size=1, max_size=5), min_size=1, max_size=4)


@given(few_letters, stop_lists)
@example("\n\n\nUser", ["\n\nUser"])
@example("ababab<", ["abab<"])
@example("aabaaabaaaa", ["aabaaaa"])
def test_any_split_gives_the_same_as_a_search(text: str, stops: list[str]) -> None:
    """However the text is split, exactly the text before the first match comes out."""
    expected = search(text, stops)

    for cut in range(len(text) + 1):
        assert expected == feed([text[:cut], text[cut:]], stops)
    assert expected == feed(list(text), stops)


@given(few_letters, stop_lists)
def test_only_a_possible_match_is_held_back(text: str, stops: list[str]) -> None:
    """Until a match, the longest suffix that begins a stop string is held back."""
    matcher = StopMatcher(StopStrings(stops))
    shown = ""
    for end, character in enumerate(text, start=1):
        result = matcher.push(character)
        if result.stop is not None:
            return
        shown += result.text
        seen = text[:end]
        beginnings = [stop[:cut] for stop in stops for cut in range(1, len(stop))]
        held = max((b for b in beginnings if seen.endswith(b)), key=len, default="")

        assert seen[: len(seen) - len(held)] == shown


def test_the_match_that_completes_first_wins() -> None:
    """A short stop string inside a longer one that began earlier ends the text."""
    assert ("xa", "b") == feed(["xabc"], ["abc", "b"])


def test_the_longest_of_matches_that_end_together_wins() -> None:
    """The longest is the one that began first."""
    assert ("x", "ab") == feed(["xab"], ["b", "ab"])


@pytest.mark.parametrize(
    ("piece", "text", "stop"),
    [("abc", "abc", None), ("<", "", None), ("<end>", "", "<end>"), ("x<end>y", "x", "<end>")],
)
def test_each_piece_is_shown_held_back_or_ends_the_text(
    piece: str, text: str, stop: str | None
) -> None:
    """Text that may be shown comes at once, with the stop string that ended it."""
    assert StopResult(text, stop) == StopMatcher(StopStrings(["<end>"])).push(piece)


def test_a_match_before_the_matcher_is_armed_is_text() -> None:
    """It is shown, and a match that completes later still ends the text."""
    matcher = StopMatcher(StopStrings(["ab"]))

    assert "ab" == matcher.push("ab", armed=False).text
    assert "" == matcher.push("a", armed=False).text
    assert "ab" == matcher.push("b").stop


def test_text_after_the_stop_string_is_dropped() -> None:
    """The rest of the piece that completed the match is dropped."""
    assert ("one ", "STOP") == feed(["one ST", "OP two"], ["STOP"])


def test_without_stop_strings_nothing_is_held_back() -> None:
    """Every piece comes out unchanged."""
    assert "abc" == StopMatcher(StopStrings([])).push("abc").text
