"""The phases of a call as spans, created when it ends so that they cost the engine nothing."""

import time

from generator_svc.sequence import SequenceGroup
from trivium.wire import tracing


def record_phases(group: SequenceGroup, first_token: float | None, last_token: float) -> None:
    """Records spans for queue, prefill and decode, as far as the call got.

    `first_token` and `last_token` are when its first and last token were generated, in seconds of
    the monotonic clock.
    """
    span, scheduled = tracing.current(), group.scheduled_at
    if not span.is_recording:
        return
    now = time.monotonic()
    tracing.record("queue", group.queued_at, now if scheduled is None else scheduled)
    if scheduled is None:
        return
    first = group.sequences[0]
    prompt = {
        "gen_ai.usage.input_tokens": first.prompt_length,
        "gen_ai.usage.cache_read.input_tokens": first.cached_prompt_tokens,
    }
    span.set(prompt)
    tracing.record("prefill", scheduled, now if first_token is None else first_token, prompt)
    if first_token is None:
        return
    span.event("first_token", first_token)
    generated = {
        "gen_ai.usage.output_tokens": sum(sequence.generated for sequence in group.sequences)
    }
    span.set(generated)
    tracing.record("decode", first_token, last_token, generated)
