"""Several streams merged into one."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from tokenizer_svc.completion_stream import merge_streams


async def counting(name: str, count: int, ended: list[str]) -> AsyncGenerator[str]:
    try:
        for number in range(count):
            await asyncio.sleep(0)
            yield f"{name}{number}"
    finally:
        ended.append(name)


async def waiting(ended: list[str]) -> AsyncGenerator[str]:
    try:
        yield "first"
        await asyncio.Event().wait()
    finally:
        ended.append("waiting")


async def failing() -> AsyncGenerator[str]:
    yield "before"
    raise RuntimeError("a fault")


@pytest.mark.parametrize("counts", [[3], [3, 0, 5], [0, 0]])
async def test_each_streams_items_keep_their_order(counts: list[int]) -> None:
    """Each stream's items keep their order, and the merged stream ends after the last."""
    ended: list[str] = []
    streams = [counting(str(place), count, ended) for place, count in enumerate(counts)]
    items = [item async for item in merge_streams(streams)]

    for place, count in enumerate(counts):
        own = [item for item in items if item[0] == str(place)]
        assert [f"{place}{number}" for number in range(count)] == own
    assert len(counts) == len(ended)


async def test_an_error_ends_all_streams() -> None:
    """The error is raised."""
    ended: list[str] = []
    with pytest.raises(RuntimeError, match="a fault"):
        async for _ in merge_streams([waiting(ended), failing()]):
            pass

    assert ["waiting"] == ended


async def test_closing_the_merged_stream_ends_all_streams() -> None:
    """They end at once, whether or not they had more to yield."""
    ended: list[str] = []
    streams = merge_streams([waiting(ended), counting("a", 100, ended)])
    await anext(streams)
    await streams.aclose()

    assert ["a", "waiting"] == sorted(ended)
