"""The values in a JSON text, counted in chunks, are as many as a parser finds."""

import json
import random
from typing import Any

import pytest

from trivium import json_size
from trivium.json_size import JsonSize, TooManyValues


def counted(value: Any) -> tuple[int, int]:
    """The number of objects, arrays and fields, and that of commas."""
    if not isinstance(value, (dict, list)):
        return 0, 0
    inner = [counted(one) for one in (value.values() if isinstance(value, dict) else value)]
    fields = len(value) if isinstance(value, dict) else 0
    heavy = 1 + fields + sum(one for one, _ in inner)
    return heavy, max(0, len(value) - 1) + sum(one for _, one in inner)


def drawn(draw: random.Random, depth: int) -> Any:
    """A random value whose strings are full of JSON's syntax."""
    kind = draw.random()
    if depth == 0 or kind < 0.4:
        return "".join(draw.choice('\\"{}[],:a1é\n') for _ in range(draw.randrange(12)))
    if kind < 0.5:
        return draw.randrange(10**9)
    if kind < 0.75:
        return [drawn(draw, depth - 1) for _ in range(draw.randrange(5))]
    return {f'{n}\\"{{[,:': drawn(draw, depth - 1) for n in range(draw.randrange(5))}


def is_excess(text: bytes) -> bool:
    try:
        JsonSize().add(text)
    except TooManyValues:
        return True
    return False


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 65_536])
def test_counts_equal_those_of_a_parser(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Wherever chunks end, a limit equal to the count passes, and one less fails."""
    monkeypatch.setattr(json_size, "CHUNK_BYTES", chunk)
    draw = random.Random(chunk)
    for number in range(200):
        value = drawn(draw, 5)
        text = json.dumps(value, ensure_ascii=bool(number % 2)).encode()
        heavy, commas = counted(value)
        for most_heavy, most_values, excess in (
            (heavy, commas, False),
            (heavy - 1, commas, True),
            (heavy, commas - 1, True),
        ):
            monkeypatch.setattr(json_size, "MAX_OBJECTS_ARRAYS_AND_FIELDS", most_heavy)
            monkeypatch.setattr(json_size, "MAX_VALUES", most_values)

            assert excess == is_excess(text), text


def test_several_texts_count_together() -> None:
    """Many small texts count like one large one."""
    size = JsonSize()
    half = json.dumps([[]] * (json_size.MAX_OBJECTS_ARRAYS_AND_FIELDS // 2 - 1)).encode()
    size.add(half)
    size.add(half)
    with pytest.raises(TooManyValues):
        size.add(b"[]")


def test_long_numbers() -> None:
    """A very long number takes long to parse, unlike a string of digits."""
    JsonSize().add(b'["' + b"3" * 100_000 + b'",' + b"1" * 400 + b"]")
    with pytest.raises(ValueError, match="400 digits"):
        JsonSize().add(b"[" + b"1" * 401 + b"]")
