"""Server-sent events, as bytes: what a stream of completion events looks like on the wire.

Knows nothing of HTTP or gRPC. What is the same in every chunk is serialised once.
"""

from rest_facade.answer import Usage, UsageSoFar
from rest_facade.convert import ChoiceDelta, Event, Header
from rest_facade.json_text import encode, json_string

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class ChunkWriter:
    """Turns the events of one stream into chunks, in order; the header comes first.

    `include_usage` ends the stream with a usage chunk, as OpenAI does; `continuous_usage`
    puts token counts into all others, which otherwise say `"usage": null`.
    """

    def __init__(self, include_usage: bool = False, continuous_usage: bool = False) -> None:
        self.complete = False
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._prefix = ""
        self._prompt_tokens = 0
        self._completion_tokens: dict[int, int] = {}

    def push(self, event: Event) -> bytes:
        """The chunks for `event`; may be none."""
        if isinstance(event, ChoiceDelta):
            return self._delta(event).encode()
        if isinstance(event, Header):
            self._start(event)
            return b""
        self.complete = True
        return self._last(event) if self._include_usage else b""

    def _start(self, header: Header) -> None:
        shared = {
            "id": header.id,
            "object": "chat.completion.chunk",
            "created": header.created,
            "model": header.model,
            "system_fingerprint": header.system_fingerprint,
        }
        self._prefix = f'data: {encode(shared).decode()[:-1]},"choices":['
        self._prompt_tokens = header.prompt_tokens

    def _delta(self, delta: ChoiceDelta) -> str:
        assert self._prefix, "A delta came before the header. This is a bug."
        index, chunks = delta.index, ""
        if index not in self._completion_tokens:
            self._completion_tokens[index] = 0
            chunks = self._chunk(index, '"role":"assistant","content":""')
        self._completion_tokens[index] = delta.completion_tokens
        if delta.content or delta.logprobs:
            logprobs = encode(delta.logprobs).decode() if delta.logprobs else "null"
            chunks += self._chunk(index, f'"content":{json_string(delta.content)}', logprobs)
        if delta.finish_reason:
            chunks += self._chunk(index, "", finish=f'"{delta.finish_reason}"')
        return chunks

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        choice = f'"index":{index},"delta":{{{delta}}},"logprobs":{logprobs}'
        return f'{self._prefix}{{{choice},"finish_reason":{finish}}}]{self._usage_part()}}}\n\n'

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
        return f'{self._prefix}],"usage":{encode(usage).decode()}}}\n\n'.encode()
