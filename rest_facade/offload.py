"""Converts large answers in a thread, so that no stream waits for them."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

INLINE_BYTES = 64 * 1024  # are converted in place, within a few milliseconds

Result = TypeVar("Result")


async def offload(message: Any, convert: Callable[[], Result]) -> Result:
    """The result of `convert`, which is about this protobuf message."""
    return convert() if message.ByteSize() <= INLINE_BYTES else await asyncio.to_thread(convert)
