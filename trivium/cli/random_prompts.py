"""Prompts of random words, of about a given length in tokens as counted by the server."""

from __future__ import annotations

import random

import httpx

from trivium.cli.answer import http_error, parsing
from trivium.cli.load import Target

# Words that most tokenizers take as one token each.
_TEXT = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name president team minute idea kid body"
)
WORDS = _TEXT.split()


class Prompts:
    """Prompts of random words that differ from the start, so that none hits the prefix cache."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.words = 1

    def draw(self, words: int | None = None) -> str:
        """A new prompt of `words` words, or of the calibrated number."""
        return " ".join(self._random.choices(WORDS, k=words or self.words))

    async def calibrate(self, client: httpx.AsyncClient, target: Target, tokens: int) -> None:
        """Finds out with two requests how many words make about `tokens` tokens."""
        few, many = 8, 72
        low = await _count(client, target, self.draw(few))
        high = await _count(client, target, self.draw(many))
        per_word = max((high - low) / (many - few), 0.01)
        self.words = max(1, round(few + (tokens - low) / per_word))


async def _count(client: httpx.AsyncClient, target: Target, prompt: str) -> int:
    body = target.body([{"role": "user", "content": prompt}], 1, stream=False)
    response = await client.post(f"{target.root}/chat/completions", json=body)
    if response.status_code != 200:
        raise http_error(response.status_code, response.content)
    with parsing():
        return int(response.json()["usage"]["prompt_tokens"])
