"""ModelService, TokenizerService, the model folder, and the process itself."""

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.ports import free_port
from tests.tokenizer_svc.conftest import CONTEXT_LENGTH, Stage, user
from tests.tokenizer_svc.sample_templates import SMOLLM2
from tests.tokenizer_svc.scripted_generator import (
    ScriptedGenerator,
    code_of,
    finish,
    message_of,
    stalls_after,
    update,
)
from tests.tokenizer_svc.test_generator_loss import NOT_SERVING, SERVING, wait_for_health
from tokenizer_svc.models import Model, load_model
from tokenizer_svc.request.types import Conversation, Message, Role
from trivium.chat.v1 import chat_pb2, chat_pb2_grpc, model_pb2
from trivium.generator.v1 import generator_pb2
from trivium.model_directory import ModelDirectoryError
from trivium.tokenizer.v1 import tokenizer_pb2
from trivium.wire.channel import open_channel
from trivium.wire.errors import ServiceError
from trivium.wire.listening import bind

CHAT_SERVICE = "trivium.chat.v1.ChatService"


async def test_models_are_listed_and_found(stage: Stage, model: Model) -> None:
    """Models have their context length, revision and a constant creation time."""
    await wait_for_health(stage.channel, "trivium.chat.v1.ModelService", SERVING)
    listed = await stage.models.ListModels(model_pb2.ListModelsRequest())
    found = await stage.models.GetModel(model_pb2.GetModelRequest(id="tiny"))

    assert [found.model] == list(listed.models)
    assert ("tiny", CONTEXT_LENGTH, model.revision) == (
        found.model.id,
        found.model.context_length,
        found.model.revision,
    )
    assert int(model.created) == found.model.create_time.seconds


async def test_detokenize_inverts_tokenize(stage: Stage) -> None:
    """Control tokens are parsed, and shown."""
    text = "a <|im_end|> \U0001fae0<|im_end|>"
    tokens = await stage.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(model="tiny", text=text))
    request = tokenizer_pb2.DetokenizeRequest(model="tiny", token_ids=tokens.token_ids)
    back = await stage.tokenizer.Detokenize(request)

    assert 2 == list(tokens.token_ids).count(2)
    assert text == back.text


async def test_tokens_as_strings(stage: Stage) -> None:
    """On request, as the vocabulary spells them: a space is \u0120 in byte-level BPE."""
    tokenize = tokenizer_pb2.TokenizeRequest(
        model="tiny", text="z z<|im_end|>\U0001fae0", return_token_strs=True
    )
    render = tokenizer_pb2.RenderChatRequest(
        model="tiny", messages=[user("z z")], return_token_strs=True
    )
    spelled = await stage.tokenizer.Tokenize(tokenize)
    rendered = await stage.tokenizer.RenderChat(render)
    tokenize.return_token_strs = False

    assert ["z", "\u0120", "z", "<|im_end|>", "\u00f0\u0141", "\u00ab\u0142"] == list(
        spelled.token_strs
    )
    assert len(rendered.token_ids) == len(rendered.token_strs)
    assert rendered.prompt == "".join(rendered.token_strs).translate({0x120: " ", 0x10A: "\n"})
    assert [] == list((await stage.tokenizer.Tokenize(tokenize)).token_strs)


async def test_a_long_text_gives_the_same_tokens(stage: Stage) -> None:
    """A long text is encoded in a thread, which makes no difference."""
    text = "word " * 2_000
    tokens = await stage.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(model="tiny", text=text))

    assert stage.encode(text) == list(tokens.token_ids)


async def test_rendering_shows_the_prompt(stage: Stage) -> None:
    """The prompt is returned as text and as the token ids that the generator gets."""
    request = tokenizer_pb2.RenderChatRequest(model="tiny", messages=[user("Hi")])
    rendered = await stage.tokenizer.RenderChat(request)
    detokenize = tokenizer_pb2.DetokenizeRequest(model="tiny", token_ids=rendered.token_ids)

    assert rendered.prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert rendered.prompt == (await stage.tokenizer.Detokenize(detokenize)).text


async def test_tokenizer_info(stage: Stage) -> None:
    """It returns its vocabulary size, its control tokens and the template."""
    request = tokenizer_pb2.GetTokenizerInfoRequest(model="tiny")
    info = await stage.tokenizer.GetTokenizerInfo(request)

    assert (512, CONTEXT_LENGTH) == (info.vocabulary_size, info.context_length)
    assert (SMOLLM2, "", "<|im_end|>") == (info.chat_template, info.bos_token, info.eos_token)
    assert {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"} == dict(info.special_tokens)


@pytest.mark.parametrize("token_id", [-1, 512])
async def test_ids_outside_the_vocabulary_are_refused(stage: Stage, token_id: int) -> None:
    """The field names the token id."""
    request = tokenizer_pb2.DetokenizeRequest(model="tiny", token_ids=[5, token_id])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.tokenizer.Detokenize(request)

    assert ("invalid_value", "token_ids[1]") == code_of(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "", "empty"),
        ("tokenizer_config.json", "[", "chat template"),
        ("chat_template.jinja", "{% if %}", "chat template: line 1"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "refuses"),
        ("chat_template.jinja", "", "empty prompt"),
        ("tokenizer_config.json", "[]", "not an object"),
    ],
)
def test_an_unusable_model_folder_is_refused(
    model_folder: Path, tmp_path: Path, name: str, content: str, words: str
) -> None:
    """It is refused at startup, with a message that names the problem."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(ModelDirectoryError, match=words):
        load_model(folder)


def test_a_base_model_is_served(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It serves plain completions; conversations are refused, and the log says so at startup."""
    folder = shutil.copytree(model_folder, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    model = load_model(folder)
    with pytest.raises(ServiceError, match="has no chat template"):
        model.prompts.build(Conversation((Message(Role.USER, ("Hello",)),)))

    assert "model base has no chat template: it serves /v1/completions only" in caplog.text
    assert "Once" == model.tokenizer.decode(model.tokenizer.encode("Once"))


async def start_process(**environment: str) -> asyncio.subprocess.Process:
    settings = {f"TRIVIUM_TOKENIZER_{name.upper()}": value for name, value in environment.items()}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tokenizer_svc"),
        env=dict(os.environ) | settings,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_all_invalid_settings_are_listed() -> None:
    """The process exits with 2."""
    process = await start_process(port="x", drain_seconds="-1")
    _, errors = await process.communicate()

    assert 2 == process.returncode
    for name in (b"PORT", b"DRAIN_SECONDS", b"MODEL_DIRECTORY"):
        assert b"TRIVIUM_TOKENIZER_" + name in errors


@pytest.mark.parametrize("models", ["notjson", "{}", '["a"'])
async def test_models_are_a_json_list(models: str) -> None:
    """Anything else is refused with one line that says so."""
    process = await start_process(models=models)
    _, errors = await process.communicate()
    [line] = errors.decode().splitlines()

    assert 2 == process.returncode
    assert line.startswith("TRIVIUM_TOKENIZER_MODELS: should be a JSON list of objects")


async def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """One line says so, and the exit code is 2."""
    process = await start_process(model_directory=str(tmp_path / "nothing"))
    _, errors = await process.communicate()

    assert (2, 1) == (process.returncode, errors.count(b"\n"))
    assert b"no such model folder" in errors


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
async def test_a_port_in_use_is_refused(setting: str, model_folder: Path) -> None:
    """One line names the setting, and the exit code is 2."""
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        ports = {"port": "0", "metrics_port": "0", setting: str(port)}
        process = await start_process(model_directory=str(model_folder), **ports)
        _, errors = await process.communicate()

    told = f"TRIVIUM_TOKENIZER_{setting.upper()}: 127.0.0.1:{port} is in use\n"
    assert (2, told) == (process.returncode, errors.decode())


async def test_the_metrics_port_must_differ(model_folder: Path) -> None:
    """It must differ from the gRPC port; the error names its setting."""
    port = free_port()
    process = await start_process(
        model_directory=str(model_folder), port=str(port), metrics_port=str(port)
    )
    _, errors = await process.communicate()

    assert 2 == process.returncode
    assert f"TRIVIUM_TOKENIZER_METRICS_PORT: 127.0.0.1:{port} is in use" in errors.decode()


@pytest.mark.parametrize("host", ["::1", "[::1]", "::", "[::]"])
async def test_ipv6(host: str, model_folder: Path) -> None:
    """IPv6 works with or without brackets, for gRPC and metrics; `::` includes IPv4, `::1` not."""
    metrics_port = free_port()
    is_remote = "1" not in host
    process = await start_process(
        model_directory=str(model_folder),
        host=host,
        port="0",
        metrics_port=str(metrics_port),
        allow_unauthenticated_remote=str(is_remote),
    )
    port = await announced_port(process)
    async with httpx.AsyncClient(trust_env=False) as client:
        for address in ("[::1]", "127.0.0.1") if is_remote else ("[::1]",):
            async with open_channel(f"{address}:{port}") as channel:
                await wait_for_health(channel, "", SERVING)
            answer = await client.get(f"http://{address}:{metrics_port}/livez")
            assert 200 == answer.status_code
    process.kill()
    await process.communicate()


async def test_running_streams_finish_after_sigterm(model_folder: Path, model: Model) -> None:
    """After SIGTERM the process is not ready, streams finish, and the exit code is 0."""
    resumed = asyncio.Event()

    async def script(start: object, stops: object) -> AsyncIterator[generator_pb2.GenerateResponse]:
        yield message_of(update(0, model.tokenizer.encode("one")))
        await resumed.wait()
        yield message_of(finish(0, generator_pb2.FINISH_REASON_LENGTH, 1))

    generator = ScriptedGenerator(model.revision)
    generator.script = script
    server, generator_port = await generator.serve()
    process = await start_process(
        model_directory=str(model_folder),
        port="0",
        metrics_port="0",
        generator_target=f"127.0.0.1:{generator_port}",
        drain_notice_seconds="0.5",
    )
    async with open_channel(f"127.0.0.1:{await announced_port(process)}") as channel:
        await wait_for_health(channel, CHAT_SERVICE, SERVING)
        call = chat_pb2_grpc.ChatServiceStub(channel).StreamChatCompletion(
            chat_pb2.CreateChatCompletionRequest(model="tiny", messages=[user("Hello")])
        )
        await call.read()
        process.send_signal(signal.SIGTERM)
        await wait_for_health(channel, CHAT_SERVICE, NOT_SERVING)
        resumed.set()
        events = [event async for event in _rest(call)]
    await process.communicate()
    await server.drain(0, 0)

    assert "one" == "".join(event.delta.content for event in events)
    assert events[-1].HasField("usage")
    assert 0 == process.returncode


async def _rest(call: Any) -> AsyncIterator[Any]:
    while (event := await call.read()) is not grpc.aio.EOF:
        yield event


async def announced_port(process: asyncio.subprocess.Process) -> int:
    assert process.stderr is not None
    while line := (await process.stderr.readline()).decode():
        if "on port " in line:
            return int(line.split("on port ")[1].split('"')[0])
    raise AssertionError("the process ended before it served")


@pytest.mark.parametrize("has_deadline", [True, False])
async def test_deadlines_and_disconnects_are_distinguished(
    stage: Stage, caplog: pytest.LogCaptureFixture, has_deadline: bool
) -> None:
    """The log and the metrics distinguish the two, though both count as aborts."""
    caplog.set_level(logging.INFO, "trivium.wire.call_boundary")
    stage.generator.script = stalls_after([message_of(update(0, [70]))])
    counted = stage.metrics.registry.get_sample_value
    for number, method in enumerate(
        (stage.chat.CreateChatCompletion, stage.chat.StreamChatCompletion), 1
    ):
        call = method(stage.request(), timeout=1.2 if has_deadline else 60)
        tiny = {"model_name": "tiny"}
        while counted("vllm:generation_tokens_total", tiny) != number:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.02)
        if not has_deadline:
            call.cancel()
        await call.code()
    async with asyncio.timeout(30):
        while len(caplog.records) < 2:  # noqa: ASYNC110 - the log has no event
            await asyncio.sleep(0.02)

    code = "deadline_exceeded" if has_deadline else "client_closed_request"
    service = "trivium.chat.v1.ChatService"
    assert [f"{service}/{name}ChatCompletion {code}" for name in ("Create", "Stream")] == [
        record.getMessage().partition(" in ")[0] for record in caplog.records
    ]
    aborted = {"model_name": "tiny", "finished_reason": "abort"}
    assert 2 == counted("trivium_requests_total", {"code": code})
    assert 2 == counted("vllm:request_success_total", aborted)
