"""Runs long computations in a thread, so that they do not delay streams."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

# Shorter texts are processed in place, within a few milliseconds, which delays streams less than
# handing them to a thread.
INLINE_CHARACTERS = 2048
INLINE_BYTES = 16_384  # of a request that is only converted and checked
INLINE_LOGPROBS = 128  # that become part of an answer
INLINE_ANSWER_BYTES = 65_536  # of a message that becomes JSON

Result = TypeVar("Result")


async def offload(size: int, work: Callable[[], Result], inline: int = INLINE_CHARACTERS) -> Result:
    """The result of `work` on an input of `size`; runs it in place if that is at most `inline`."""
    return work() if size <= inline else await asyncio.to_thread(work)
