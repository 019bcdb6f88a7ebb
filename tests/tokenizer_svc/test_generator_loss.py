"""A generator that disappears, comes back, or serves something else."""

import asyncio
import logging
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.tokenizer_svc.conftest import Stage, running
from tests.tokenizer_svc.scripted_generator import (
    code_of,
    fails_after,
    finish,
    message_of,
    says,
    stalls_after,
    update,
)
from tokenizer_svc.models import Model
from tokenizer_svc.service import PIPELINE_SERVICES, TOKENIZER_SERVICE
from trivium.generator.v1 import generator_pb2
from trivium.wire.errors import ServiceError
from trivium.wire.replicas.replica_set import GAP_SECONDS

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

ANSWER = [message_of(update(0, [2]), finish(0, generator_pb2.FINISH_REASON_STOP_TOKEN, 1))]


async def wait_for_health(channel: grpc.aio.Channel, service: str, status: int) -> None:
    """Returns once the service's health is `status`."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=service)
    )
    async for response in watch:
        if response.status == status:
            watch.cancel()
            return


async def health(stage: Stage, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(stage.channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


async def test_readiness_follows_the_generators(stage: Stage) -> None:
    """Readiness follows the generator's in both directions; liveness does not depend on it."""
    for service in PIPELINE_SERVICES:
        await wait_for_health(stage.channel, service, SERVING)
    await stage.stop_generator()
    for service in PIPELINE_SERVICES:
        await wait_for_health(stage.channel, service, NOT_SERVING)

    assert SERVING == await health(stage, "")
    assert SERVING == await health(stage, TOKENIZER_SERVICE)

    await stage.start_generator()
    for service in PIPELINE_SERVICES:
        await wait_for_health(stage.channel, service, SERVING)


async def test_health_reports_why_it_is_not_ready(stage: Stage) -> None:
    """check_ready, which answers /healthz, gives the reason."""
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], SERVING)
    await stage.server.check_ready()
    await stage.stop_generator()
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], NOT_SERVING)

    with pytest.raises(ServiceError, match="The generator cannot be reached"):
        await stage.server.check_ready()


async def test_a_loss_is_logged_only_once_a_generator_was_ready(
    model: Model, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is logged as a warning or error before the first generator is ready; a loss is."""

    def errors() -> list[str]:
        # Only our own: gRPC's poller may complain of another test's event loop.
        ours = [one for one in caplog.records if one.name.startswith(("tokenizer_svc", "trivium"))]
        return [one.message for one in ours if one.levelname in ("WARNING", "ERROR")]

    stage = Stage(model, model_folder)
    await stage.start_generator()  # to choose a port
    await stage.stop_generator()
    await stage.start_tokenizer()
    try:
        await asyncio.sleep(GAP_SECONDS + 0.5)

        assert "backend_unavailable" == await refusal(stage)
        assert [] == errors()

        await stage.start_generator()
        await wait_for_health(stage.channel, PIPELINE_SERVICES[0], SERVING)
        await stage.stop_generator()
        await wait_for_health(stage.channel, PIPELINE_SERVICES[0], NOT_SERVING)

        assert ["no generator is available: The generator cannot be reached."] == errors()
    finally:
        await stage.close()


async def test_calls_fail_fast_and_recover(stage: Stage) -> None:
    """No call waits for a missing generator; once it is back, calls succeed."""
    stage.generator.script = says(ANSWER)
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], SERVING)
    await stage.stop_generator()
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], NOT_SERVING)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.stream()

    assert grpc.StatusCode.UNAVAILABLE is refused.value.code()
    assert ("backend_unavailable", None) == code_of(refused.value)

    await stage.start_generator()
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], SERVING)

    assert await stage.stream()


async def test_a_generator_that_dies_mid_stream(stage: Stage) -> None:
    """The stream ends with backend_unavailable, not with a truncated answer."""
    stage.generator.script = stalls_after([message_of(update(0, [70]))])
    call = stage.chat.StreamChatCompletion(stage.request())
    await call.read()
    await stage.stop_generator()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
        await call.read()

    assert ("backend_unavailable", None) == code_of(refused.value)


async def test_another_revision_is_refused(stage: Stage) -> None:
    """Token ids of one tokenizer are never sent to a model with another."""
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], SERVING)
    own, stage.generator.revision = stage.generator.revision, "another"
    await stage.stop_generator()
    await stage.start_generator()
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], NOT_SERVING)
    for _ in range(500):
        if await refusal(stage) == "revision_mismatch":
            break
        await asyncio.sleep(0.02)
    stage.generator.calls.clear()

    assert "revision_mismatch" == await refusal(stage)
    assert NOT_SERVING == await health(stage, PIPELINE_SERVICES[1])
    assert [] == stage.generator.calls

    stage.generator.revision = own
    stage.generator.script = says(ANSWER)
    await stage.stop_generator()
    await stage.start_generator()
    await wait_for_health(stage.channel, PIPELINE_SERVICES[0], SERVING)

    assert await stage.stream()


async def refusal(stage: Stage) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.stream()
    return code_of(refused.value)[0]


async def test_the_generator_checks_the_revision_itself(stage: Stage) -> None:
    """Several generators may share a name, and only one of them was asked for its revision."""
    mismatch = ServiceError("revision_mismatch", "The generator serves revision b.")
    stage.generator.script = fails_after([], mismatch)
    with pytest.raises(grpc.aio.AioRpcError, match="revision b") as refused:
        await stage.stream()

    assert grpc.StatusCode.FAILED_PRECONDITION is refused.value.code()
    assert ("revision_mismatch", None) == code_of(refused.value)


async def test_a_blocked_event_loop_does_not_report_a_loss(
    model: Model, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A blocked event loop does not make the tokenizer report a generator as lost."""
    caplog.set_level(logging.INFO)
    async with running(model, model_folder) as stage:
        for _ in range(3):
            await asyncio.sleep(0)  # it starts looking for a generator
        time.sleep(GAP_SECONDS + 0.5)  # noqa: ASYNC251 - blocks the event loop on purpose
        stage.generator.script = says(ANSWER)
        answer = await stage.chat.CreateChatCompletion(stage.request())

    assert 1 == len(answer.choices)
    assert "cannot be reached" not in caplog.text
