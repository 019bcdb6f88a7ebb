"""Usage records: one for each call that the engine accepted, however it ended."""

import asyncio
import json

import grpc
import pytest

from tests.generator_svc.generator_stage import REVISION, Stage
from trivium.generator.v1 import generator_pb2 as pb

LONG = {"max_new_tokens": 50, "ignore_eos": True}


def records_in(folder):
    """All records, in the order in which they were written."""
    lines = (folder / "generator.usage.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
async def stage(tmp_path):
    async with Stage(usage_log=tmp_path).running() as stage:
        yield stage


async def written(stage, folder, count):
    """The records, once there are `count`."""
    async with asyncio.timeout(30):
        while len(records_in(folder)) < count:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
    return records_in(folder)


async def call(stage, prompt, *metadata, **fields):
    """Starts a call with this metadata."""
    call = stage.stub.Generate(metadata=metadata)
    start = pb.StartGeneration(revision=REVISION, prompt_token_ids=prompt, **fields)
    await call.write(pb.GenerateRequest(start=start))
    return call


async def test_record_has_key_cost_and_times(stage, tmp_path):
    """Its key, cost and times; a prompt that was seen before is partly cached."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    metadata = (
        ("x-request-id", "req_1"),
        ("traceparent", f"00-{trace}-b7ad6b7169203331-01"),
        ("x-trivium-key-name", "alice"),
    )
    prompt = [3, 4, 5, 6, 7, 8, 9, 10]
    for _ in range(2):
        answer = await call(stage, prompt, *metadata, max_new_tokens=4, ignore_eos=True)
        await answer.done_writing()
        messages = [message async for message in answer]
    first, second = await written(stage, tmp_path, 2)

    finished = messages[-1].updates[0].finished
    assert finished.device_nanoseconds == second["device_nanoseconds"] > 0
    assert finished.device_nanoseconds / 1e9 == second["gpu_seconds"]
    assert finished.cached_prompt_tokens == second["cached_tokens"] > 0 == first["cached_tokens"]
    wanted = {
        "event": "usage",
        "service": "generator_svc",
        "request_id": "req_1",
        "trace_id": trace,
        "key": "alice",
        "model": "m",
        "status": 200,
        "finish_reason": "length",
        "prompt_tokens": 8,
        "completion_tokens": 4,
        "reasoning_tokens": None,
    }
    assert wanted == {name: second[name] for name in wanted}
    assert 0 <= second["queue_seconds"] <= second["ttft_seconds"] <= second["duration_seconds"]


async def test_record_has_the_counts_of_the_completion_report(stage, tmp_path):
    """The record has its counts and finish reasons, which are those that the client got."""
    answer = await call(stage, [5, 6], sends_report=True, n=2, **LONG)
    async for message in answer:
        if any(update.HasField("finished") for update in message.updates):
            break
    report = pb.CompletionReport(
        completion_tokens=7, reasoning_tokens=3, finish_reasons=["tool_calls", "length"]
    )
    await answer.write(pb.GenerateRequest(report=report))
    await answer.done_writing()
    async for _ in answer:
        pass
    [record] = await written(stage, tmp_path, 1)

    assert (7, 3) == (record["completion_tokens"], record["reasoning_tokens"])
    assert "tool_calls,length" == record["finish_reason"]


@pytest.mark.parametrize(
    "report",
    [
        {"completion_tokens": -5},
        {"completion_tokens": 4},
        {"completion_tokens": 2, "reasoning_tokens": 3},
        {"completion_tokens": 2, "reasoning_tokens": -1},
        {"completion_tokens": 2, "finish_reasons": ["x" * 1000]},
        {"completion_tokens": 2, "finish_reasons": ["stop,status=0"]},
    ],
)
async def test_an_impossible_report_does_not_cost_the_record(stage, tmp_path, report, caplog):
    """It is ignored and logged: the record has the generator's own numbers."""
    answer = await call(stage, [5, 6], sends_report=True, max_new_tokens=3, ignore_eos=True)
    await answer.write(pb.GenerateRequest(report=pb.CompletionReport(**report)))
    await answer.done_writing()
    async for _ in answer:
        pass
    [record] = await written(stage, tmp_path, 1)

    assert (3, None, "length") == (
        *(record["completion_tokens"], record["reasoning_tokens"]),
        record["finish_reason"],
    )
    assert f"impossible completion report of {record['request_id']} ignored" in caplog.messages


async def test_aborted_and_failed_calls_are_recorded(stage, tmp_path):
    """Cancelled, running or queued, or failed: records and overhead add up to the busy time."""
    stage.runner.delay = 0.01
    left = [await call(stage, [2, 3, value], n=2, **LONG) for value in range(4, 10)]
    await anext(aiter(left[0]))
    await stage.until(lambda load: load.waiting_sequences >= 3)
    for answer in reversed(left):
        answer.cancel()
    await written(stage, tmp_path, 6)
    await stage.until_free()
    stage.runner.fails = lambda slots: OSError("run")
    failed = await call(stage, [5, 6], n=2, **LONG)
    with pytest.raises(grpc.aio.AioRpcError, match="INTERNAL"):
        await anext(aiter(failed))
    *records, failure = await written(stage, tmp_path, 7)
    await stage.until_free()
    busy, overhead, _ = stage.meter.snapshot()

    assert {(499, "abort")} == {(record["status"], record["finish_reason"]) for record in records}
    assert (500, "error") == (failure["status"], failure["finish_reason"])
    assert failure["device_nanoseconds"] > 0
    records.append(failure)
    assert busy == overhead.total() + sum(record["device_nanoseconds"] for record in records)
    assert max(record["completion_tokens"] for record in records) > 0
    waited = [record for record in records if not record["device_nanoseconds"]]
    assert {(0, 0)} == {(r["prompt_tokens"], r["completion_tokens"]) for r in waited}


async def test_exceeded_deadline_is_recorded_as_504(stage, tmp_path):
    """A deadline is not recorded as a client that disconnected."""
    stage.runner.delay = 0.05
    answer = await stage.call([5, 6], seconds=0.5, **LONG)
    with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
        async for _ in answer:
            pass
    [record] = await written(stage, tmp_path, 1)

    assert (504, "abort") == (record["status"], record["finish_reason"])


async def test_running_calls_are_recorded_at_shutdown(tmp_path):
    """With the device time that it took until then."""
    stage = Stage(usage_log=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        async with stage.running():
            stage.runner.delay = 0.01
            answer = await call(stage, [5, 6], **LONG)
            await anext(aiter(answer))
            raise KeyboardInterrupt
    [record] = records_in(tmp_path)
    busy, overhead, _ = stage.meter.snapshot()

    assert busy == overhead.total() + record["device_nanoseconds"]
    assert 503 == record["status"]


async def test_refused_calls_have_no_record(stage, tmp_path):
    """Another generator may accept them."""
    for prompt in ([], [1] * 100):
        answer = await call(stage, prompt)
        with pytest.raises(Exception, match=r"prompt|context"):
            async for _ in answer:
                pass
    await stage.generate([5, 6], max_new_tokens=2)

    assert 1 == len(await written(stage, tmp_path, 1))


async def test_totals_by_key(stage, tmp_path):
    """Metrics are the sums of the records; without a key, the name is empty."""
    for name in ("alice", "bob", "alice"):
        answer = await call(stage, [5, 6, 7], ("x-trivium-key-name", name), max_new_tokens=3)
        await answer.done_writing()
        async for _ in answer:
            pass
    await stage.generate([5, 6], max_new_tokens=2)
    records = await written(stage, tmp_path, 4)

    for key in ("alice", "bob", ""):
        own = [record for record in records if record["key"] == key]
        for kind in ("prompt", "cached", "completion"):
            total = sum(record[f"{kind}_tokens"] for record in own)
            assert total == stage.metric("trivium_key_tokens_total", key=key, type=kind)
        nanoseconds = sum(record["device_nanoseconds"] for record in own)
        assert nanoseconds == stage.metric("trivium_key_device_nanoseconds_total", key=key) > 0


@pytest.mark.parametrize("name", ["a b", "x" * 65, 'a"b'])
async def test_invalid_key_names_are_ignored(stage, tmp_path, name):
    """Callers cannot put anything into records and labels that breaks them."""
    answer = await call(stage, [5, 6], ("x-trivium-key-name", name), max_new_tokens=2)
    await answer.done_writing()
    async for _ in answer:
        pass

    assert "" == (await written(stage, tmp_path, 1))[0]["key"]
