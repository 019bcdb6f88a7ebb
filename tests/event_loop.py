"""How long a call blocks the event loop of the test, in which the server runs too."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any


async def stall(call: Awaitable[Any]) -> float:
    """The longest time that the event loop was blocked during a call, as a share of the whole."""
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    began = time.monotonic()
    beating = asyncio.create_task(beat())
    await call
    beating.cancel()
    return longest / (time.monotonic() - began)
