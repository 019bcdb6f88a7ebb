"""Searching a text for control tokens step by step finds what one search of the whole finds."""

import random
import re

import pytest

from tokenizer_svc.prompt import control_tokens
from tokenizer_svc.prompt.control_tokens import ControlTokenEscaper

TOKENS = ["<|a|>", "<|ab|>", "<|a|>x", "|><|", "[I]", "[I"]
PIECES = ["<|", "a", "b", "|>", "x", "[", "I", "]", "<|a|>"]
ANY = "|".join(map(re.escape, sorted(TOKENS, key=len, reverse=True)))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 1_000])
def test_step_boundaries_change_no_match(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Wherever a step ends, the longest token at each position is found, and found once."""
    monkeypatch.setattr(control_tokens, "_STEP_CHARACTERS", step)
    draw, escaper = random.Random(step), ControlTokenEscaper(TOKENS)
    for _ in range(500):
        text = "".join(draw.choices(PIECES, k=draw.randrange(14)))

        expected = re.sub(ANY, lambda token: f"({token[0]})", text)
        assert expected == escaper.renamed(text, lambda token: f"({token})")
        assert not re.search(ANY, escaper.escaped(text, "\ufdd2"))
