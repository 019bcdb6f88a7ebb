"""ChatService, and the server of all gRPC services of this stage.

A completion: `_complete` → validate → prompt → constraint → completion_stream.
"""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from tokenizer_svc.completion_stream import CompletionJob, stream_completion
from tokenizer_svc.constraint.grammar import build_constraint
from tokenizer_svc.convert.request import chat_request
from tokenizer_svc.convert.response import stream_response, whole_response
from tokenizer_svc.generator.types import Constraint
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import Model, ServedModels
from tokenizer_svc.output.completion import WholeCompletion
from tokenizer_svc.output.decoding_options import chat_decoding
from tokenizer_svc.output.events import Event
from tokenizer_svc.prompt.builder import Prompt
from tokenizer_svc.request.request_size import check_chat_size
from tokenizer_svc.request.types import ValidRequest
from tokenizer_svc.request.validate import check_prompt_logprobs, validate
from tokenizer_svc.service_completion import CompletionService
from tokenizer_svc.service_models import ModelService, TokenizerService
from tokenizer_svc.trace import name_request
from trivium.chat.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    completion_pb2_grpc,
    model_pb2_grpc,
)
from trivium.offload import INLINE_BYTES, INLINE_LOGPROBS, offload
from trivium.tokenizer.v1 import tokenizer_pb2_grpc
from trivium.wire.call_boundary import Guard
from trivium.wire.channel import remaining_seconds
from trivium.wire.in_flight import InFlight
from trivium.wire.serving import GrpcServer
from trivium.wire.tls.server import ServerTls

# These serve only while a generator does; TokenizerService needs none.
PIPELINE_SERVICES = (
    "trivium.chat.v1.ChatService",
    "trivium.chat.v1.CompletionService",
    "trivium.chat.v1.ModelService",
)
TOKENIZER_SERVICE = "trivium.tokenizer.v1.TokenizerService"
# The calls that count against a key's limits.
COMPLETIONS = (
    "/trivium.chat.v1.ChatService/CreateChatCompletion",
    "/trivium.chat.v1.ChatService/StreamChatCompletion",
    "/trivium.chat.v1.CompletionService/CreateCompletion",
    "/trivium.chat.v1.CompletionService/StreamCompletion",
)

Call = grpc.aio.ServicerContext[Any, Any]


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """trivium.chat.v1.ChatService; the unary call is the stream, read to its end."""

    def __init__(self, models: ServedModels, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    async def StreamChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Call
    ) -> AsyncIterator[chat_pb2.StreamChatCompletionResponse]:
        async with aclosing(self._complete(request, context, whole=False)) as events:
            async for event in events:
                yield stream_response(event)

    async def CreateChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Call
    ) -> chat_pb2.CreateChatCompletionResponse:
        whole = WholeCompletion()
        async with aclosing(self._complete(request, context, whole=True)) as events:
            async for event in events:
                whole.push(event)
        return await offload(whole.logprobs, lambda: whole_response(whole), INLINE_LOGPROBS)

    async def _complete(
        self, message: chat_pb2.CreateChatCompletionRequest, context: Call, whole: bool
    ) -> AsyncGenerator[Event]:
        created = time.time()
        name_request("chat", message.model)
        with self._metrics.request() as meter:
            check_chat_size(message)
            served = self._models.find(message.model)
            model = served.model
            request, size = await offload(
                message.ByteSize(), lambda: _valid(message, model), INLINE_BYTES
            )
            kept = served.kept_tokens(request.options)
            prompt = await served.prompt(request.conversation, kept)
            check_prompt_logprobs(request.options, len(prompt.token_ids))
            job = CompletionJob(
                id=f"chatcmpl-{uuid.uuid4().hex}",
                created=created,
                prompts=[prompt.token_ids],
                options=request.options,
                decoding=chat_decoding(
                    request.options,
                    request.tool_use,
                    model.output,
                    prompt.thinking,
                    model.tokenizer.marker_id,
                    request.conversation.continue_final_message,
                ),
                constraint=await offload(size, lambda: _constraint(model, request, prompt)),
                whole=whole,
                bad_words=await model.encode_bad_words(request.options.bad_words),
            )
            events = stream_completion(served, job, meter, remaining_seconds(context))
            async with aclosing(events):
                async for event in events:
                    yield event


def _valid(message: chat_pb2.CreateChatCompletionRequest, model: Model) -> tuple[ValidRequest, int]:
    """The validated request, and its number of characters of JSON to be parsed."""
    request = chat_request(message)
    return validate(request, model.vocabulary_size), request.schema_characters


def _constraint(model: Model, request: ValidRequest, prompt: Prompt) -> Constraint | None:
    return build_constraint(
        request.options.response_constraint,
        request.tool_use,
        model.output,
        prompt.thinking,
        model.tokenizer.marker_id,
    )


def create_server(
    models: ServedModels,
    metrics: Metrics,
    max_connection_age_seconds: float,
    in_flight: InFlight,
    guard: Guard | None = None,
    has_reflection: bool = True,
    tls: ServerTls | None = None,
) -> GrpcServer:
    """A server of all services for these models."""
    chat, completions = ChatService(models, metrics), CompletionService(models, metrics)

    def refused(method: str, code: str) -> None:
        if method in COMPLETIONS:
            metrics.requests.labels(code).inc()

    return GrpcServer(
        [
            (chat_pb2_grpc.add_ChatServiceServicer_to_server, chat),
            (completion_pb2_grpc.add_CompletionServiceServicer_to_server, completions),
            (model_pb2_grpc.add_ModelServiceServicer_to_server, ModelService(models)),
            (tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, TokenizerService(models)),
        ],
        [*PIPELINE_SERVICES, TOKENIZER_SERVICE],
        max_connection_age_seconds=max_connection_age_seconds,
        in_flight=in_flight,
        guard=guard,
        has_reflection=has_reflection,
        tls=tls,
        refused=refused,
    )
