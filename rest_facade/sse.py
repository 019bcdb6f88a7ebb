"""Server-sent events, as bytes: what a stream of completion events looks like on the wire.

Knows nothing of HTTP or gRPC. What is the same in every chunk is serialised once.
"""

from typing import Any

from rest_facade.convert.chat import ChatEvent, ChoiceDelta, ToolCallPiece
from rest_facade.convert.completion import TextDelta, TextEvent
from rest_facade.convert.envelope import Header
from rest_facade.json_encoding import encode, to_json
from rest_facade.requests.options import Options
from rest_facade.responses import Logprobs, TextLogprobs, Usage, UsageSoFar

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def sse_event(body: Any) -> bytes:
    """`body` as the JSON of one event."""
    return b"data: " + encode(body) + b"\n\n"


class _Writer:
    """The frame of a chunk: what all chunks say, and the usage.

    `include_usage` ends the stream with a usage chunk, as OpenAI does; `continuous_usage_stats`
    puts token counts into all others, which otherwise say `"usage": null`.
    """

    object = ""

    def __init__(self, wanted: Options) -> None:
        options = wanted.stream_options
        self.complete = False
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._has_tier = wanted.service_tier is not None
        self._prefix = ""
        self._prompt_tokens = 0
        self._completion_tokens: dict[int, int] = {}

    def _start(self, header: Header) -> None:
        shared = {
            "id": header.id,
            "object": self.object,
            "created": header.created,
            "model": header.model,
        }
        if self._has_tier:
            shared["service_tier"] = "default"
        shared["system_fingerprint"] = header.system_fingerprint
        self._prefix = f'data: {encode(shared).decode()[:-1]},"choices":['
        self._prompt_tokens = header.prompt_tokens

    def _chunk(self, choice: str, logprobs: Logprobs | TextLogprobs | None, finish: str) -> str:
        assert self._prefix, "A delta came before the header. This is a bug."
        shown = encode(logprobs).decode() if logprobs else "null"
        rest = f'"logprobs":{shown},"finish_reason":{finish}'
        return f"{self._prefix}{{{choice},{rest}}}]{self._usage_part()}}}\n\n"

    def _usage_part(self) -> str:
        if not self._include_usage:
            return ""
        if not self._continuous_usage:
            return ',"usage":null'
        generated = sum(self._completion_tokens.values())
        usage: UsageSoFar = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }
        return f',"usage":{encode(usage).decode()}'

    def _last(self, usage: Usage) -> bytes:
        self.complete = True
        if not self._include_usage:
            return b""
        return f'{self._prefix}],"usage":{encode(usage).decode()}}}\n\n'.encode()


class ChatWriter(_Writer):
    """Turns the events of one chat's stream into chunks, in order; the header comes first."""

    object = "chat.completion.chunk"

    def push(self, event: ChatEvent) -> bytes:
        """The chunks for `event`; may be none."""
        if isinstance(event, ChoiceDelta):
            return self._delta(event).encode()
        if isinstance(event, Header):
            self._start(event)
            return b""
        return self._last(event)

    def _delta(self, delta: ChoiceDelta) -> str:
        index, chunks = delta.index, ""
        if index not in self._completion_tokens:
            self._completion_tokens[index] = 0
            # Null where content may never come.
            opens_otherwise = (delta.tool_calls or delta.reasoning) and not delta.content
            opening = "null" if opens_otherwise else '""'
            chunks = self._choice(index, f'"role":"assistant","content":{opening}')
        self._completion_tokens[index] = delta.completion_tokens
        parts = _parts(delta)
        if delta.logprobs and not parts:
            parts = ['"content":""']
        # Log-probabilities stand beside the last of what their tokens made.
        for position, part in enumerate(parts, start=1):
            logprobs = delta.logprobs if position == len(parts) else None
            chunks += self._choice(index, part, logprobs)
        if delta.finish_reason:
            chunks += self._choice(index, "", finish=f'"{delta.finish_reason}"')
        return chunks

    def _choice(
        self, index: int, delta: str, logprobs: Logprobs | None = None, finish: str = "null"
    ) -> str:
        return self._chunk(f'"index":{index},"delta":{{{delta}}}', logprobs, finish)


def _parts(delta: ChoiceDelta) -> list[str]:
    """What is new, each to be the only thing in its chunk."""
    parts = []
    if delta.reasoning:
        parts.append(f'"reasoning_content":{to_json(delta.reasoning)}')
    if delta.content:
        parts.append(f'"content":{to_json(delta.content)}')
    for piece in delta.tool_calls:
        if piece.id is not None:
            parts.append(_opened(piece))
        if piece.arguments:
            function = f'{{"arguments":{to_json(piece.arguments)}}}'
            parts.append(f'"tool_calls":[{{"index":{piece.index},"function":{function}}}]')
    return parts


def _opened(piece: ToolCallPiece) -> str:
    """The first word on a call; its arguments come in chunks of their own, as with OpenAI."""
    call = {
        "index": piece.index,
        "id": piece.id,
        "type": "function",
        "function": {"name": piece.name, "arguments": ""},
    }
    return f'"tool_calls":[{encode(call).decode()}]'


class TextWriter(_Writer):
    """The same for a plain completion's stream."""

    object = "text_completion"

    def push(self, event: TextEvent) -> bytes:
        """The chunks for `event`; may be none."""
        if isinstance(event, TextDelta):
            return self._delta(event).encode()
        if isinstance(event, Header):
            self._start(event)
            return b""
        return self._last(event)

    def _delta(self, delta: TextDelta) -> str:
        self._completion_tokens[delta.index] = delta.completion_tokens
        chunks = ""
        if delta.text or delta.logprobs:
            choice = f'"index":{delta.index},"text":{to_json(delta.text)}'
            chunks = self._chunk(choice, delta.logprobs, "null")
        if delta.finish_reason:
            choice = f'"index":{delta.index},"text":""'
            chunks += self._chunk(choice, None, f'"{delta.finish_reason}"')
        return chunks
