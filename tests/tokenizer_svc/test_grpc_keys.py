"""API keys over gRPC: which calls are accepted, which key they count for, and each key's limits."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.tokenizer_svc.conftest import Stage, running
from tests.tokenizer_svc.scripted_generator import (
    finish,
    message_of,
    says,
    update,
)
from tests.tokenizer_svc.test_generator_loss import SERVING, wait_for_health
from tokenizer_svc.models import Model
from trivium.chat.v1 import model_pb2
from trivium.generator.v1 import generator_pb2
from trivium.keys import watched_file
from trivium.keys.key_file import KeyFile, KeyFileError
from trivium.tokenizer.v1 import tokenizer_pb2
from trivium.wire.errors import ServiceError, from_rpc_error

STOP = generator_pb2.FINISH_REASON_STOP_TOKEN

Start = Callable[..., AbstractAsyncContextManager[Stage]]


def table(name: str, /, **fields: object) -> str:
    """A key's table in the key file; the key is its name."""
    lines = [f"[keys.{name}]", f'digest = "{hashlib.sha256(name.encode()).hexdigest()}"']
    return "\n".join([*lines, *(f"{field} = {value}" for field, value in fields.items())]) + "\n"


def bearer(key: str, **more: str) -> tuple[tuple[str, str], ...]:
    return (
        ("authorization", f"Bearer {key}"),
        *((k.replace("_", "-"), v) for k, v in more.items()),
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


@pytest.fixture
def start(model: Model, model_folder: Path, file: Path) -> Start:
    """Starts a stage that accepts the keys in these tables."""

    def started(*tables: str) -> AbstractAsyncContextManager[Stage]:
        write(file, *tables)
        return running(model, model_folder, api_keys_file=file)

    return started


def write(file: Path, *tables: str) -> None:
    file.write_text("\n".join(tables))


def answers(stage: Stage) -> None:
    """Each answer has three completion tokens."""
    stage.generator.script = says(
        [message_of(update(0, stage.encode("abc"))), message_of(finish(0, STOP, 3))]
    )


async def ask(stage: Stage, *metadata: tuple[str, str]) -> Any:
    return await stage.chat.CreateChatCompletion(stage.request(), metadata=metadata)


async def refusal(call: Any) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_calls_need_a_valid_key(start: Start) -> None:
    """Any call with a missing, unknown or expired key is refused; health checks need none."""
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    async with start(table("good"), table("old", expires=yesterday)) as stage:
        answers(stage)
        health = health_pb2_grpc.HealthStub(stage.channel)
        checked = await health.Check(health_pb2.HealthCheckRequest())
        await ask(stage, *bearer("good"))
        for metadata in ((), bearer("bad"), bearer("old")):
            stream = stage.chat.StreamChatCompletion(stage.request(), metadata=metadata)
            listed = stage.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata)
            errors = [
                await refusal(ask(stage, *metadata)),
                await refusal(stream.read()),
                await refusal(listed),
            ]
            assert ["invalid_api_key"] * 3 == [error.code for error in errors]

    assert checked.status == health_pb2.HealthCheckResponse.SERVING
    assert 1 == len(stage.generator.calls)


async def test_calls_count_for_their_key(start: Start) -> None:
    """Only another stage may name the key that a call counts for, as it has checked that key.
    Anyone else is refused: it would be a facade configured with a client's key."""
    async with start(table("good"), table("facade", stage="true")) as stage:
        answers(stage)
        for name in ({}, {"x_trivium_key_name": "good"}):
            await ask(stage, *bearer("good", **name))
        await ask(stage, *bearer("facade", x_trivium_key_name="alice"))
        error = await refusal(ask(stage, *bearer("good", x_trivium_key_name="somebody")))

    names = [call.metadata["x-trivium-key-name"] for call in stage.generator.calls]
    assert ["good", "good", "alice"] == names
    assert "invalid_api_key" == error.code
    assert "stage = true" in error.message
    assert not [call for call in stage.generator.calls if "authorization" in call.metadata]


async def test_a_key_gives_access_to_its_models_only(start: Start) -> None:
    """For every service, other models seem not to exist."""
    async with start(table("a", models='["tiny"]'), table("b", models='["large"]')) as stage:
        answers(stage)
        await wait_for_health(stage.channel, "trivium.chat.v1.ModelService", SERVING)
        request = model_pb2.ListModelsRequest()
        listed = [
            [model.id for model in found.models]
            for key in "ab"
            for found in [await stage.models.ListModels(request, metadata=bearer(key))]
        ]
        await ask(stage, *bearer("a"))
        tokenize = tokenizer_pb2.TokenizeRequest(model="tiny", text="a")
        errors = [
            await refusal(ask(stage, *bearer("b"))),
            await refusal(stage.tokenizer.Tokenize(tokenize, metadata=bearer("b"))),
            await refusal(
                stage.models.GetModel(model_pb2.GetModelRequest(id="tiny"), metadata=bearer("b"))
            ),
        ]

    assert [["tiny"], []] == listed
    assert [("model_not_found", param) for param in ("model", "model", "id")] == [
        (error.code, error.param) for error in errors
    ]


async def test_requests_over_the_limit_are_refused(start: Start) -> None:
    """The refusal says when to retry; initial metadata counts down like HTTP's headers."""
    async with start(table("a", requests_per_minute=1), table("b")) as stage:
        answers(stage)
        call = stage.chat.CreateChatCompletion(stage.request(), metadata=bearer("a"))
        await call
        told = dict(await call.initial_metadata())
        late = stage.chat.StreamChatCompletion(stage.request(), metadata=bearer("a"))
        error = await refusal(late.read())
        told_late = dict(await late.initial_metadata())
        await ask(stage, *bearer("b"))

    assert ("rate_limit_exceeded", True) == (error.code, 50 < (error.retry_after or 0) <= 60)
    assert ("1", "0") == (
        told["x-ratelimit-limit-requests"],
        told["x-ratelimit-remaining-requests"],
    )
    assert "0" == told_late["x-ratelimit-remaining-requests"]


async def test_tokens_count_when_a_call_has_ended(start: Start) -> None:
    """Prompt and completion tokens count; calls that are not completions cost nothing."""
    async with start(table("a", tokens_per_minute=30)) as stage:
        answers(stage)
        usage = (await ask(stage, *bearer("a"))).usage
        tokenize = tokenizer_pb2.TokenizeRequest(model="tiny", text="a" * 1000)
        await stage.tokenizer.Tokenize(tokenize, metadata=bearer("a"))
        error = await refusal(ask(stage, *bearer("a")))

    assert 30 <= usage.prompt_tokens + usage.completion_tokens
    assert ("rate_limit_exceeded", True) == (error.code, "tokens" in error.message)


async def test_every_answer_has_its_request_id(start: Start) -> None:
    """Answers, streams and errors, even refusals for a wrong key, have the caller's id or a new one
    in their trailing metadata."""
    own = (*bearer("a"), ("x-request-id", "mine"))
    async with start(table("a")) as stage:
        answers(stage)
        known, unknown = stage.request(), stage.request(model="unknown")
        streamed = stage.chat.StreamChatCompletion(known, metadata=own)
        async for _ in streamed:
            pass
        calls = [
            streamed,
            stage.chat.CreateChatCompletion(known, metadata=own),
            stage.chat.CreateChatCompletion(unknown, metadata=own),
            stage.chat.StreamChatCompletion(unknown, metadata=own),
            stage.models.ListModels(model_pb2.ListModelsRequest(), metadata=own[1:]),
        ]
        told = [dict(await call.trailing_metadata()).get("x-request-id") for call in calls]
        trailers = await stage.chat.CreateChatCompletion(known).trailing_metadata()
        new = dict(trailers).get("x-request-id", "")

    assert ["mine"] * 5 == told
    assert new.startswith("req_")


async def test_refusals_are_counted(start: Start) -> None:
    """Refusals are counted by code, like later failures; only completions are counted."""
    async with start(table("a", requests_per_minute=1)) as stage:
        answers(stage)
        before = counted(stage)
        await ask(stage, *bearer("a"))
        for _ in range(2):
            await refusal(ask(stage, *bearer("a")))
        wrong = stage.chat.StreamChatCompletion(stage.request(), metadata=bearer("b"))
        await refusal(wrong.read())
        await refusal(stage.models.ListModels(model_pb2.ListModelsRequest()))
        after = counted(stage)

    assert {"ok": 1, "rate_limit_exceeded": 2, "invalid_api_key": 1} == {
        code: count - before[code] for code, count in after.items() if count != before[code]
    }


@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"])
async def test_a_message_that_cannot_be_decoded(
    start: Start, caplog: pytest.LogCaptureFixture, message: bytes
) -> None:
    """Invalid protobuf and invalid UTF-8 are the caller's error, but the key is checked first."""
    service = "/trivium.chat.v1.ChatService"
    async with start(table("a")) as stage:
        before = counted(stage)
        whole = stage.channel.unary_unary(f"{service}/CreateChatCompletion")
        streamed = stage.channel.unary_stream(f"{service}/StreamChatCompletion")
        strangers = [await refusal(whole(message)), await refusal(streamed(message).read())]
        errors = [
            await refusal(whole(message, metadata=bearer("a"))),
            await refusal(streamed(message, metadata=bearer("a")).read()),
        ]
        after = counted(stage)

    assert ["invalid_api_key"] * 2 == [error.code for error in strangers]
    assert [("invalid_value", "The message cannot be decoded.")] * 2 == [
        (error.code, error.message) for error in errors
    ]
    assert 2 == after["invalid_value"] - before["invalid_value"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def counted(stage: Stage) -> dict[str, float]:
    """trivium_requests_total by code."""
    samples = [one for family in stage.metrics.registry.collect() for one in family.samples]
    return {
        one.labels["code"]: one.value for one in samples if one.name == "trivium_requests_total"
    }


async def test_stage_keys_have_no_limits(start: Start, file: Path) -> None:
    """A stage's key is not counted, and giving it limits, which would be ignored, is an error."""
    async with start(table("facade", stage="true")) as stage:
        answers(stage)
        for _ in range(3):
            await ask(stage, *bearer("facade"))

    write(file, table("facade", stage="true", requests_per_minute=3))
    with pytest.raises(KeyFileError, match=r"keys\.facade: .*requests_per_minute"):
        KeyFile(file)


async def test_a_revoked_key_is_refused(
    start: Start, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New calls are refused from then on."""
    monkeypatch.setattr(watched_file, "CHECK_SECONDS", 0)
    async with start(table("a")) as stage:
        answers(stage)
        await ask(stage, *bearer("a"))
        write(file, table("b"))
        error = await refusal(ask(stage, *bearer("a")))
        await ask(stage, *bearer("b"))

    assert "invalid_api_key" == error.code


async def test_reflection_can_be_disabled(model: Model, model_folder: Path) -> None:
    """Without reflection, the service is unimplemented."""
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    codes = []
    for is_open in (True, False):
        async with running(model, model_folder, reflection=is_open) as stage:
            call = stage.channel.stream_stream(reflection)()
            await call.done_writing()
            codes.append(await call.code())

    assert [grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED] == codes
