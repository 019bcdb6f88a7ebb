"""Several models, each with its own generator, found by id or alias."""

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import ValidationError

from tests.tokenizer_svc import sample_templates as templates
from tests.tokenizer_svc.conftest import user, write_model
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.scripted_generator import (
    ScriptedGenerator,
    code_of,
    finish,
    message_of,
    says,
    update,
)
from tests.tokenizer_svc.test_generator_loss import NOT_SERVING, SERVING, wait_for_health
from tests.tokenizer_svc.test_tokenizer_stage import start_process
from tokenizer_svc.config import TokenizerSettings
from tokenizer_svc.families.choose import HERMES, MISTRAL
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.server import TokenizerServer, load_models
from trivium.chat.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc
from trivium.generator.v1 import generator_pb2
from trivium.model_directory import ModelDirectoryError
from trivium.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from trivium.wire.channel import open_channel
from trivium.wire.serving import GrpcServer

STOP_TOKEN = generator_pb2.FINISH_REASON_STOP_TOKEN
CHAT_SERVICE = "trivium.chat.v1.ChatService"


class Pair:
    """Two models, `a` and `b`, with a generator each."""

    def __init__(self, folder: Path) -> None:
        self.folders = {
            "a": write_model(folder / "a"),
            "b": write_model(
                folder / "b", templates.QWEN3, byte_level(plain=templates.QWEN_PLAIN_TOKENS)
            ),
        }
        self.generators: dict[str, ScriptedGenerator] = {}
        self.servers: dict[str, GrpcServer] = {}

    async def start(self) -> None:
        ports = {}
        revisions = {model.id: model.revision for model in load_models(self._settings({}))}
        for name, revision in revisions.items():
            generator = ScriptedGenerator(revision)
            end = message_of(update(0, [70 if name == "a" else 71, 2]), finish(0, STOP_TOKEN, 2))
            generator.script = says([end])
            self.generators[name] = generator
            self.servers[name], ports[name] = await generator.serve()
        settings = self._settings(ports)
        self.server = TokenizerServer(settings, load_models(settings), Metrics())
        await self.server.start()
        self.channel = open_channel(f"127.0.0.1:{self.server.port}")
        self.chat: Any = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)
        self.tokenizer: Any = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)

    def _settings(self, ports: dict[str, int]) -> TokenizerSettings:
        models = [
            {
                "model_directory": str(folder),
                "generator_target": f"127.0.0.1:{ports.get(name, 1)}",
                "aliases": [f"my-{name}"],
                "default_max_tokens": 5 if name == "b" else None,
            }
            for name, folder in self.folders.items()
        ]
        return TokenizerSettings(
            models=json.dumps(models),  # type: ignore[arg-type]
            port=0,
            default_max_tokens=9,
            drain_notice_seconds=0,
            drain_seconds=0,
        )

    async def listed(self) -> list[str]:
        answer = await self.models.ListModels(model_pb2.ListModelsRequest())
        return [model.id for model in answer.models]

    async def until_listed(self, names: list[str]) -> None:
        found: list[str] = []
        while found != names:
            with suppress(grpc.aio.AioRpcError):  # until a generator has been reached
                found = await self.listed()

    async def ask(self, model: str) -> Any:
        request = chat_pb2.CreateChatCompletionRequest(model=model, messages=[user("Hi")])
        return await self.chat.CreateChatCompletion(request)

    async def close(self) -> None:
        await self.channel.close()
        await self.server.drain()
        for server in self.servers.values():
            await server.drain(0, 0)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path)
    await pair.start()
    yield pair
    await pair.close()


async def test_each_model_has_its_generator(pair: Pair) -> None:
    """A request goes to the generator of its model, and the answer names the model."""
    for name in ("a", "b"):
        answer = await pair.ask(name)

        assert name == answer.header.model
        assert 1 == len(pair.generators[name].calls)


async def test_each_model_has_its_default_max_tokens(pair: Pair) -> None:
    """A model's own default, or else that of all models."""
    for name, expected in (("a", 9), ("b", 5)):
        await pair.ask(name)

        assert expected == pair.generators[name].calls[-1].start.max_new_tokens


async def test_aliases_resolve_to_the_model(pair: Pair) -> None:
    """Answers and model objects have the model's real id."""
    answer = await pair.ask("my-b")
    found = await pair.models.GetModel(model_pb2.GetModelRequest(id="my-b"))
    info = await pair.tokenizer.GetTokenizerInfo(
        tokenizer_pb2.GetTokenizerInfoRequest(model="my-b")
    )

    assert ("b", "b") == (answer.header.model, found.model.id)
    assert templates.QWEN3 == info.chat_template


async def test_unknown_models_are_not_found(pair: Pair) -> None:
    """Other models' names do not matter."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pair.ask("c")

    assert ("model_not_found", "model") == code_of(refused.value)


async def test_healthy_models_are_listed(pair: Pair) -> None:
    """The stage is ready while one is healthy; a model without its generator is unavailable."""
    await pair.until_listed(["a", "b"])
    await pair.servers["a"].drain(0, 0)
    await pair.until_listed(["b"])
    await wait_for_health(pair.channel, CHAT_SERVICE, SERVING)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pair.ask("a")

    assert ("backend_unavailable", None) == code_of(refused.value)
    assert await pair.ask("b")

    await pair.servers["b"].drain(0, 0)
    await wait_for_health(pair.channel, CHAT_SERVICE, NOT_SERVING)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pair.listed()

    assert ("backend_unavailable", None) == code_of(refused.value)


def models(**more: Any) -> dict[str, Any]:
    return {"models": json.dumps([{"model_directory": "x"} | more])}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "model_directory"),
        (models() | {"model_directory": "y"}, "model_directory"),
        ({"models": "["}, "models"),
        ({"models": '[{"generator_target": "x"}]'}, "models"),
        (models(generator_target=""), "models"),
        (models(tool_parser="vllm"), "models"),
        (models(reasoning_parser="r2"), "models"),
        (models(port=1), "models"),
        (models(default_max_tokens=0), "models"),
        ({"model_directory": "y", "default_max_tokens": 0}, "default_max_tokens"),
        ({"model_directory": "y", "tool_parser": "vllm"}, "tool_parser"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, Any], field: str) -> None:
    """They are refused at startup; the error names the setting."""
    with pytest.raises(ValidationError) as refused:
        TokenizerSettings(**given)

    assert field in {error["loc"][0] for error in refused.value.errors()}


async def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    """Even a malformed list is reported by its variable's name."""
    process = await start_process(models="[{}")
    _, errors = await process.communicate()

    assert 2 == process.returncode
    assert b"TRIVIUM_TOKENIZER_MODELS: " in errors


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    """Neither ids nor aliases may be shared by two models."""
    folder, other = write_model(tmp_path / "a"), tmp_path / "other"
    other.mkdir()
    for second in (
        {"model_directory": str(write_model(other / "a"))},
        {"model_directory": str(write_model(tmp_path / "b")), "aliases": ["a"]},
    ):
        settings = TokenizerSettings(
            models=json.dumps([{"model_directory": str(folder)}, second])  # type: ignore[arg-type]
        )
        with pytest.raises(ModelDirectoryError, match="two models go by the name a"):
            load_models(settings)


def test_parsers_can_be_configured(tmp_path: Path) -> None:
    """Parsers can be set for all models, or for a single one."""
    folders = [str(write_model(tmp_path / name)) for name in ("a", "b", "c")]
    one, two, three = (
        model.output
        for model in load_models(
            TokenizerSettings(
                tool_parser="mistral",
                models=json.dumps(  # type: ignore[arg-type]
                    [
                        {"model_directory": folders[0]},
                        {"model_directory": folders[1], "tool_parser": "auto"},
                        {"model_directory": folders[2], "reasoning_parser": "qwen3"},
                    ]
                ),
            )
        )
    )

    assert (MISTRAL, HERMES, MISTRAL) == (one.tools, two.tools, three.tools)
    assert (False, True) == (one.thinks, three.thinks)
