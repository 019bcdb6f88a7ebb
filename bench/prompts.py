"""Prompts of an exact length that are in no cache: random words, counted by our own tokenizer."""

from __future__ import annotations

import random
from typing import Any

import httpx

from bench.play import Answer, Message, Request
from trivium.cli.random_prompts import WORDS

_SYSTEM_WORDS = 8
_TRIES = 200


class Text:
    """Calls the services' tokenizer, while nothing is being measured.

    `url` is the base URL of the REST API, without /v1.
    """

    def __init__(self, url: str, model: str) -> None:
        self._client = httpx.Client(base_url=url, trust_env=False, timeout=60.0)
        self._model = model
        self._known: dict[tuple[str, ...], tuple[int, ...]] = {}  # contenders share prompts

    def token_ids(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """A conversation's prompt, from the chat template and the tokenizer."""
        key = tuple(message["content"] for message in messages)
        if key not in self._known:
            tokens = self._post("/tokenize", messages=list(messages))["tokens"]
            self._known[key] = tuple(tokens)
        return self._known[key]

    def text(self, token_ids: tuple[int, ...]) -> str:
        """The text of these token ids."""
        return str(self._post("/detokenize", tokens=list(token_ids))["prompt"])

    def close(self) -> None:
        self._client.close()

    def _post(self, path: str, **body: object) -> Any:
        response = self._client.post(path, json={"model": self._model, **body})
        response.raise_for_status()
        return response.json()


class Prompts:
    """Draws prompts from a seed, so that all contenders get the same.

    The system message is random too: with the chat template's default, all prompts would share a
    prefix, which would be cached.
    """

    def __init__(self, text: Text, seed: str) -> None:
        self._text = text
        self._random = random.Random(seed)
        self._words_for: dict[int, int] = {}

    def words(self, count: int) -> str:
        """Random words."""
        return " ".join(self._random.choices(WORDS, k=count))

    def request(self, tokens: int, output: int, n: int = 1, system: str | None = None) -> Request:
        """A request with a prompt of exactly `tokens` tokens; a random system message by default.

        Raises ValueError if that cannot be done.
        """
        system = self.words(_SYSTEM_WORDS) if system is None else system
        count = self._words_for.get(tokens, tokens // 4)  # short: long ones may be refused
        for _ in range(_TRIES):
            messages = _conversation(system, self.words(max(count, 1)))
            ids = self._text.token_ids(messages)
            if len(ids) == tokens:
                self._words_for[tokens] = count
                return Request(messages, ids, output, n)
            # With a small vocabulary, words take several tokens.
            a_word = max(len(ids) / (count + _SYSTEM_WORDS), 1.0)
            count = max(count + round((tokens - len(ids)) / a_word), 1)
        raise ValueError(f"cannot make a prompt of {tokens} tokens; the closest has {len(ids)}")

    def next_turn(self, request: Request, answer: Answer, words: int) -> Request:
        """Continues the conversation with the answer and a new question."""
        text = answer.text or self._text.text(answer.token_ids)
        messages = (
            *request.messages,
            {"role": "assistant", "content": text or "-"},
            {"role": "user", "content": self.words(words)},
        )
        return Request(messages, self._text.token_ids(messages), request.output)


def _conversation(system: str, user: str) -> tuple[Message, ...]:
    return {"role": "system", "content": system}, {"role": "user", "content": user}
