"""A request's span attributes, named by OpenTelemetry's conventions for generative AI.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/. The text of prompts and answers is
not among them.
"""

import time
from collections.abc import Sequence

from tokenizer_svc.generator.types import TokenUpdate
from tokenizer_svc.output.completion import Completion, CompletionStep
from tokenizer_svc.output.events import FinishReason, Usage
from tokenizer_svc.request.types import ValidOptions
from trivium.wire import tracing

_MAX_NAME_CHARACTERS = 200
_SAMPLING = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed")


def name_request(operation: str, model: str) -> None:
    """Names the current span after the operation and the requested model."""
    model = model[:_MAX_NAME_CHARACTERS]
    span = tracing.current()
    span.rename(f"{operation} {model}")
    span.set(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "trivium",
            "gen_ai.request.model": model,
        }
    )


class CompletionTrace:
    """Records the progress of a completion on the current span."""

    def __init__(self, id: str, model: str, options: ValidOptions, is_stream: bool) -> None:
        self._span = tracing.current()
        self.is_recorded = self._span.is_recording
        self._began = time.monotonic()
        self._first: float | None = None  # when the first tokens arrived
        self._last = 0.0  # when the last ones were decoded
        self._busy_seconds = 0.0
        if not self.is_recorded:
            return
        sampling = options.sampling
        attributes: dict[str, str | int | float] = {
            f"gen_ai.request.{name}": getattr(sampling, name)
            for name in _SAMPLING
            if sampling.HasField(name)
        }
        if options.max_completion_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = options.max_completion_tokens
        if options.n != 1:
            attributes["gen_ai.request.choice.count"] = options.n
        if is_stream:
            attributes["gen_ai.request.stream"] = True
        self._span.set({**attributes, "gen_ai.response.id": id, "gen_ai.response.model": model})

    def decode(self, completion: Completion, updates: Sequence[TokenUpdate]) -> CompletionStep:
        """Passes the updates to `completion`; the first ones to arrive are recorded as an event."""
        if not self.is_recorded:
            return completion.take(updates)
        came = time.monotonic()
        if self._first is None:
            self._first = came
            self._span.event("first_token", came)
            self._span.set({"gen_ai.response.time_to_first_chunk": came - self._began})
        step = completion.take(updates)
        self._last = time.monotonic()
        self._busy_seconds += self._last - came
        return step

    def close(self) -> None:
        """Records the span of detokenization, with the seconds in which it was busy."""
        if self._first is not None:
            busy = {"trivium.busy_seconds": self._busy_seconds}
            tracing.record("detokenize", self._first, self._last, busy)

    def record_end(self, usage: Usage, reasons: Sequence[FinishReason]) -> None:
        """Records the usage and each choice's finish reason of a completion that succeeded."""
        self._span.set(
            {
                "gen_ai.response.finish_reasons": [reason.value for reason in reasons],
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
                "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
                "trivium.gpu_seconds": usage.device_nanoseconds / 1e9,
            }
        )
