"""Several asynchronous streams as one, each item as soon as it is there.

Knows nothing of what the items are.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merged(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """All items of all streams. Ends when all have ended; the first fault ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    # Room for one: who reads slowly holds up the streams.
    items: asyncio.Queue[Item] = asyncio.Queue(1)
    readers = [asyncio.create_task(_read(stream, items)) for stream in streams]
    getting: asyncio.Task[Item] | None = None
    try:
        while not items.empty() or not all(reader.done() for reader in readers):
            getting = getting or asyncio.create_task(items.get())
            waiting = [reader for reader in readers if not reader.done()]
            await asyncio.wait([getting, *waiting], return_when=asyncio.FIRST_COMPLETED)
            for reader in readers:
                if reader.done():
                    reader.result()
            if getting.done():
                yield getting.result()
                getting = None
    finally:
        tasks = readers if getting is None else [*readers, getting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(stream: AsyncGenerator[Item], items: asyncio.Queue[Item]) -> None:
    async with aclosing(stream):
        async for item in stream:
            await items.put(item)
