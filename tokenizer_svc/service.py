"""The gRPC calls that this stage answers.

The road of a completion: `_complete` → validate → prompt → generator → Completion → events.
Decides nothing about text.
"""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from tokenizer_svc import convert
from tokenizer_svc.completion import Completion, WholeAnswer
from tokenizer_svc.events import Event, Header
from tokenizer_svc.generation import Start
from tokenizer_svc.generator_client import GeneratorClient
from tokenizer_svc.generator_watch import GeneratorWatch
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import Model, off_loop
from tokenizer_svc.prompt import Prompt
from tokenizer_svc.request import ChatRequest, Message, ValidRequest
from tokenizer_svc.validate import check_messages, validate
from trivium.chat.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc
from trivium.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from trivium.wire.channel import remaining_seconds
from trivium.wire.errors import ServiceError, internal_error
from trivium.wire.serving import GrpcServer

log = logging.getLogger(__name__)

# These two answer only while the generator does; the tokenizer's own service needs no one.
PIPELINE_SERVICES = ("trivium.chat.v1.ChatService", "trivium.chat.v1.ModelService")
TOKENIZER_SERVICE = "trivium.tokenizer.v1.TokenizerService"

Call = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class ServedModel:
    """A model and the generator that runs it."""

    model: Model
    connection: GeneratorClient
    watch: GeneratorWatch

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together that both stages take."""
        own, generators = self.model.context_length, self.watch.context_length
        return own if generators is None else min(own, generators)

    async def prompt(self, messages: tuple[Message, ...]) -> Prompt:
        return await self.model.prompt(messages, self.context_length)


Models = Mapping[str, ServedModel]


def _find(models: Models, model_id: str, param: str = "model") -> ServedModel:
    if not model_id:
        message = f"Missing required parameter: '{param}'."
        raise ServiceError("missing_required_parameter", message, param)
    if model_id not in models:
        raise ServiceError("model_not_found", f"The model `{model_id}` does not exist.", param)
    return models[model_id]


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """trivium.chat.v1.ChatService; the unary call is the stream, read to its end."""

    def __init__(self, models: Models, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    async def StreamChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Call
    ) -> AsyncIterator[chat_pb2.StreamChatCompletionResponse]:
        async with aclosing(self._complete(convert.chat_request(request), context)) as events:
            async for event in events:
                yield convert.stream_response(event)

    async def CreateChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Call
    ) -> chat_pb2.CreateChatCompletionResponse:
        answer = WholeAnswer()
        async with aclosing(self._complete(convert.chat_request(request), context)) as events:
            async for event in events:
                answer.push(event)
        return convert.whole_response(answer)

    async def _complete(self, chat: ChatRequest, context: Call) -> AsyncGenerator[Event]:
        accepted = time.time()
        with self._metrics.request() as meter:
            served = _find(self._models, chat.model)
            request = validate(chat, served.model.vocabulary_size)
            prompt = await served.prompt(request.messages)
            served.watch.check_revision()
            tokens = len(prompt.token_ids)
            completion = Completion(request, served.model.tokenizer, tokens)
            header: Header | None = _header(served.model, accepted, tokens)
            start = _start(served, request, prompt.token_ids)
            generation = served.connection.generate(start, remaining_seconds(context))
            async with aclosing(generation.messages()) as messages:
                async for updates in messages:
                    if header is not None:
                        meter.prompt(served.model.id, tokens)
                        yield header
                        header = None
                    step = completion.take(updates)
                    await generation.stop(step.stops)
                    meter.step(updates, step.deltas)
                    for delta in step.deltas:
                        yield delta
            if not completion.done:
                log.error("the generator ended the call before its choices")
                raise internal_error()
            yield completion.usage


def _header(model: Model, accepted: float, prompt_tokens: int) -> Header:
    return Header(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=accepted,
        model=model.id,
        fingerprint=model.fingerprint,
        prompt_tokens=prompt_tokens,
    )


def _start(served: ServedModel, request: ValidRequest, token_ids: list[int]) -> Start:
    room = served.context_length - len(token_ids)
    longest = request.max_completion_tokens
    return Start(
        revision=served.model.revision,
        token_ids=token_ids,
        request=request,
        max_new_tokens=room if longest is None else min(longest, room),
    )


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """trivium.chat.v1.ModelService."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Call
    ) -> model_pb2.ListModelsResponse:
        by_id = [served for _, served in sorted(self._models.items())]
        models = [convert.model(served.model, served.context_length) for served in by_id]
        return model_pb2.ListModelsResponse(models=models)

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Call
    ) -> model_pb2.GetModelResponse:
        served = _find(self._models, request.id, "id")
        model = convert.model(served.model, served.context_length)
        return model_pb2.GetModelResponse(model=model)


class TokenizerService(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """trivium.tokenizer.v1.TokenizerService."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def RenderChat(
        self, request: tokenizer_pb2.RenderChatRequest, context: Call
    ) -> tokenizer_pb2.RenderChatResponse:
        served = _find(self._models, request.model)
        convert.refuse_unsupported(request)
        messages = convert.chat_messages(request.messages)
        check_messages(messages)
        prompt = await served.prompt(messages)
        return tokenizer_pb2.RenderChatResponse(prompt=prompt.text, token_ids=prompt.token_ids)

    async def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: Call
    ) -> tokenizer_pb2.TokenizeResponse:
        tokenizer = _find(self._models, request.model).model.tokenizer
        token_ids = await off_loop(
            len(request.text), lambda: tokenizer.encode(request.text, request.add_special_tokens)
        )
        return tokenizer_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: Call
    ) -> tokenizer_pb2.DetokenizeResponse:
        model = _find(self._models, request.model).model
        token_ids = list(request.token_ids)
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < model.vocabulary_size:
                field = f"token_ids[{index}]"
                message = f"Invalid '{field}': {token_id} is not in the model's vocabulary."
                raise ServiceError("invalid_value", message, field)
        text = await off_loop(len(token_ids), lambda: model.tokenizer.decode(token_ids))
        return tokenizer_pb2.DetokenizeResponse(text=text)


def create_server(models: Models, metrics: Metrics) -> GrpcServer:
    """A server of all three services over these models."""
    return GrpcServer(
        [
            (chat_pb2_grpc.add_ChatServiceServicer_to_server, ChatService(models, metrics)),
            (model_pb2_grpc.add_ModelServiceServicer_to_server, ModelService(models)),
            (tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, TokenizerService(models)),
        ],
        [*PIPELINE_SERVICES, TOKENIZER_SERVICE],
    )
