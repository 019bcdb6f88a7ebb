"""The chunks of a stream: what chat and plain completions share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, cast

from rest_facade.convert import envelope
from rest_facade.requests.options import SharedOptions
from rest_facade.responses import CompletionUsage, UsageSoFar
from trivium.chat.v1 import chat_pb2

ChunkObject = TypeVar("ChunkObject")


class Chunks(ABC, Generic[ChunkObject]):
    """Turns the events of one stream into chunks, in order; the header comes first.

    `include_usage` ends the stream with a usage chunk, as OpenAI does; `continuous_usage_stats`
    adds token counts to all others, which otherwise have `"usage": null`. `complete` once the usage
    has arrived, which is a stream's last event.
    """

    object = ""

    def __init__(self, options: SharedOptions) -> None:
        stream_options = options.stream_options
        self.complete = False
        self._include_usage = bool(stream_options and stream_options.include_usage)
        self._continuous_usage = bool(stream_options and stream_options.continuous_usage_stats)
        self._return_token_ids = bool(options.return_token_ids)
        self._has_tier = options.service_tier is not None
        self._head: dict[str, Any] = {}
        self._prompt_tokens = 0
        self._completion_tokens: dict[int, int] = {}
        self._taken: tuple[int, int] | None = None

    def push(self, response: Any) -> list[ChunkObject]:
        """The chunks for one event, possibly none; raises ValueError for an empty event."""
        match response.WhichOneof("event"):
            case "delta":
                assert self._head, "A delta came before the header. This is a bug."
                delta = response.delta
                with_ids = self._return_token_ids
                choices = self._choices_with_ids(delta) if with_ids else self._choices(delta)
                # One by one, as each chunk has the token counts at the time it is created.
                return [self._chunk([choice]) for choice in choices]
            case "header":
                self._start(response.header)
                return []
            case "usage":
                self.complete = True
                self._taken = envelope.taken(response.usage)
                usage = envelope.usage(response.usage)
                return [self._chunk([], usage)] if self._include_usage else []
        raise ValueError("an event of the stream is empty")

    @property
    def taken(self) -> tuple[int, int | None]:
        """Prompt and completion tokens so far, and device time in nanoseconds once complete."""
        if self._taken is not None:
            return self._taken
        return self._prompt_tokens + sum(self._completion_tokens.values()), None

    @abstractmethod
    def _choices(self, delta: Any) -> Iterator[Any]:
        """Yields the choice of each chunk for `delta`; updates the token counts."""

    @abstractmethod
    def _choices_with_ids(self, delta: Any) -> Iterator[Any]:
        """The same with token ids: those of `delta` are in its first chunk with text or a finish
        reason, or in a chunk of their own."""

    def _start(self, header: chat_pb2.CompletionHeader) -> None:
        self._head = {
            "id": header.id,
            "object": self.object,
            "created": header.create_time.seconds,
            "model": header.model,
        }
        if self._has_tier:
            self._head["service_tier"] = "default"
        self._head["system_fingerprint"] = header.system_fingerprint
        self._prompt_tokens = header.prompt_tokens

    def _chunk(self, choices: list[Any], usage: CompletionUsage | None = None) -> ChunkObject:
        chunk = {**self._head, "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage or self._usage_so_far()
        return cast(ChunkObject, chunk)

    def _usage_so_far(self) -> UsageSoFar | None:
        if not self._continuous_usage:
            return None
        generated = sum(self._completion_tokens.values())
        return UsageSoFar(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._prompt_tokens + generated,
        )
