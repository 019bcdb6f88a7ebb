"""The gRPC calls that answer a conversation, and the server of all calls of this stage.

The road of a completion: `_complete` → validate → prompt → generator → Completion → events.
Decides nothing about text.
"""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from tokenizer_svc.completion_stream import answer, chat_constraint, chat_reading, start
from tokenizer_svc.convert.request import chat_request
from tokenizer_svc.convert.response import stream_response, whole_response
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import INLINE_BYTES, Model, off_loop
from tokenizer_svc.output.completion import Completion, WholeAnswer
from tokenizer_svc.output.events import Event, Header
from tokenizer_svc.request.request_size import check_chat_size
from tokenizer_svc.request.types import ValidRequest
from tokenizer_svc.request.validate import validate
from tokenizer_svc.served_model import ServedModels
from tokenizer_svc.service_completion import CompletionService
from tokenizer_svc.service_models import ModelService, TokenizerService
from trivium.chat.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    completion_pb2_grpc,
    model_pb2_grpc,
)
from trivium.tokenizer.v1 import tokenizer_pb2_grpc
from trivium.wire.channel import remaining_seconds
from trivium.wire.serving import GrpcServer

# These answer only while a generator does; the tokenizer's own service needs no one.
PIPELINE_SERVICES = (
    "trivium.chat.v1.ChatService",
    "trivium.chat.v1.CompletionService",
    "trivium.chat.v1.ModelService",
)
TOKENIZER_SERVICE = "trivium.tokenizer.v1.TokenizerService"

Call = grpc.aio.ServicerContext[Any, Any]


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """trivium.chat.v1.ChatService; the unary call is the stream, read to its end."""

    def __init__(self, models: ServedModels, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    async def StreamChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Call
    ) -> AsyncIterator[chat_pb2.StreamChatCompletionResponse]:
        async with aclosing(self._complete(request, context)) as events:
            async for event in events:
                yield stream_response(event)

    async def CreateChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Call
    ) -> chat_pb2.CreateChatCompletionResponse:
        whole = WholeAnswer()
        async with aclosing(self._complete(request, context)) as events:
            async for event in events:
                whole.push(event)
        return whole_response(whole)

    async def _complete(
        self, asked: chat_pb2.CreateChatCompletionRequest, context: Call
    ) -> AsyncGenerator[Event]:
        accepted = time.time()
        with self._metrics.request() as meter:
            check_chat_size(asked)
            served = self._models.find(asked.model)
            model = served.model
            request, size = await off_loop(
                asked.ByteSize(), lambda: _valid(asked, model), INLINE_BYTES
            )
            prompt = await served.prompt(request.conversation)
            tokens = len(prompt.token_ids)
            reading = chat_reading(model, request, prompt)
            completion = Completion(request.options.n, reading, model.tokenizer, tokens)
            header: Header | None = _header(model, accepted, tokens)
            constraint = await off_loop(size, lambda: chat_constraint(model, request, prompt))
            command = start(served, request.options, prompt.token_ids, constraint)
            steps = answer(served, command, completion, meter, remaining_seconds(context))
            async with aclosing(steps):
                async for deltas in steps:
                    if header is not None:
                        yield header
                        header = None
                    for delta in deltas:
                        yield delta
            yield completion.usage


def _valid(asked: chat_pb2.CreateChatCompletionRequest, model: Model) -> tuple[ValidRequest, int]:
    """The request, and how many characters of schemas are in it."""
    chat = chat_request(asked)
    return validate(chat, model.vocabulary_size), chat.schema_characters


def _header(model: Model, accepted: float, prompt_tokens: int) -> Header:
    return Header(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=accepted,
        model=model.id,
        fingerprint=model.fingerprint,
        prompt_tokens=prompt_tokens,
    )


def create_server(
    models: ServedModels, metrics: Metrics, max_connection_age_seconds: float
) -> GrpcServer:
    """A server of all services over these models."""
    chat, completions = ChatService(models, metrics), CompletionService(models, metrics)
    return GrpcServer(
        [
            (chat_pb2_grpc.add_ChatServiceServicer_to_server, chat),
            (completion_pb2_grpc.add_CompletionServiceServicer_to_server, completions),
            (model_pb2_grpc.add_ModelServiceServicer_to_server, ModelService(models)),
            (tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, TokenizerService(models)),
        ],
        [*PIPELINE_SERVICES, TOKENIZER_SERVICE],
        max_connection_age_seconds=max_connection_age_seconds,
    )
