"""A tokenizer stage in front of a scripted generator, both over real gRPC."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.completion_requests import chat_request
from tests.tokenizer_svc.sample_templates import SMOLLM2
from tests.tokenizer_svc.sample_tokenizers import byte_level
from tests.tokenizer_svc.scripted_generator import ScriptedGenerator
from tokenizer_svc.config import TokenizerSettings
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import Model, load_model
from tokenizer_svc.server import TokenizerServer
from trivium.chat.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    completion_pb2_grpc,
    model_pb2_grpc,
)
from trivium.keys.settings import open_keys
from trivium.tokenizer.v1 import tokenizer_pb2_grpc
from trivium.wire.channel import open_channel
from trivium.wire.serving import GrpcServer

CONTEXT_LENGTH = 256


def write_model(
    folder: Path,
    template: str = SMOLLM2,
    tokenizer: str | None = None,
    context_length: int = CONTEXT_LENGTH,
    eos_token: str = "<|im_end|>",
) -> Path:
    """A model folder whose graph is never run."""
    folder.mkdir()
    decoder = {
        "filename": "model.onnx",
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_size": 8,
        "hidden_size": 8,
        "inputs": {},
        "outputs": {},
    }
    model = {
        "type": "llama",
        "context_length": context_length,
        "vocab_size": 512,
        "eos_token_id": 2,
        "decoder": decoder,
    }
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    (folder / "model.onnx").write_bytes(b"no graph")
    (folder / "tokenizer.json").write_text(tokenizer or byte_level())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose template has no tools."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Model:
    return load_model(model_folder)


class Stage:
    """The tokenizer stage, its generator, and a client for it."""

    def __init__(self, model: Model, folder: Path, **settings: Any) -> None:
        self.model = model
        self.generator = ScriptedGenerator(model.revision, max(512, model.context_length))
        self.metrics = Metrics()
        self._folder = folder
        self._settings = settings
        self._generator_server: GrpcServer | None = None
        self.generator_port = 0

    async def start(self) -> None:
        await self.start_generator()
        await self.start_tokenizer()

    async def start_tokenizer(self) -> None:
        settings = TokenizerSettings(
            model_directory=self._folder,
            port=0,
            generator_target=f"127.0.0.1:{self.generator_port}",
            drain_notice_seconds=0,
            drain_seconds=0,
            **self._settings,
        )
        keys = open_keys("API_KEYS_FILE", settings.api_keys_file)
        self.server = TokenizerServer(settings, [self.model], self.metrics, keys)
        await self.server.start()
        self.channel = open_channel(f"127.0.0.1:{self.server.port}")
        self.chat: Any = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.completions: Any = completion_pb2_grpc.CompletionServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)
        self.tokenizer: Any = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)

    async def start_generator(self) -> None:
        self._generator_server, self.generator_port = await self.generator.serve(
            self.generator_port
        )

    async def stop_generator(self) -> None:
        if self._generator_server is not None:
            await self._generator_server._server.stop(None)  # a drain would refuse politely
            self._generator_server = None

    async def close(self) -> None:
        await self.channel.close()
        await self.server.drain()
        await self.stop_generator()

    def request(self, **fields: Any) -> chat_pb2.CreateChatCompletionRequest:
        """A valid request with these fields, including options and sampling parameters."""
        good: dict[str, Any] = {"model": self.model.id, "messages": [user("Hello")]}
        return chat_request(**good | fields)

    def encode(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    async def stream(self, **fields: Any) -> list[chat_pb2.StreamChatCompletionResponse]:
        """All events of one stream."""
        call = self.chat.StreamChatCompletion(self.request(**fields))
        return [event async for event in call]


@pytest.fixture
async def stage(model: Model, model_folder: Path) -> AsyncIterator[Stage]:
    async with running(model, model_folder) as stage:
        yield stage


@asynccontextmanager
async def running(model: Model, folder: Path, **settings: Any) -> AsyncIterator[Stage]:
    """A running stage that serves this model."""
    stage = Stage(model, folder, **settings)
    await stage.start()
    try:
        yield stage
    finally:
        await stage.close()
        await asyncio.sleep(0)


def user(text: str) -> chat_pb2.ChatMessage:
    """A user message."""
    part = chat_pb2.ContentPart(text=text)
    return chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=[part])
