"""A ChatService with a fixed answer, over real gRPC."""

from collections.abc import AsyncIterator
from typing import Any

from trivium.chat.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc
from trivium.wire.serving import GrpcServer

MODEL = "scripted"
WORDS = ("The capital ", "of France ", "is Paris.")
USAGE = chat_pb2.Usage(prompt_tokens=15, completion_tokens=8, device_nanoseconds=250_000_000)
NAMES = ("trivium.chat.v1.ChatService", "trivium.chat.v1.ModelService")


class ScriptedChat(chat_pb2_grpc.ChatServiceServicer):
    """Answers WORDS, and records the requests."""

    def __init__(self) -> None:
        self.requests: list[chat_pb2.CreateChatCompletionRequest] = []

    async def StreamChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Any
    ) -> AsyncIterator[chat_pb2.StreamChatCompletionResponse]:
        self.requests.append(request)
        header = chat_pb2.CompletionHeader(id=f"chatcmpl-{'0' * 32}", model=MODEL)
        header.create_time.GetCurrentTime()
        yield chat_pb2.StreamChatCompletionResponse(header=header)
        for word in WORDS:
            delta = chat_pb2.ChoiceDelta(content=word)
            yield chat_pb2.StreamChatCompletionResponse(delta=delta)
        last = chat_pb2.ChoiceDelta(finish_reason=chat_pb2.FINISH_REASON_STOP)
        yield chat_pb2.StreamChatCompletionResponse(delta=last)
        yield chat_pb2.StreamChatCompletionResponse(usage=USAGE)

    async def CreateChatCompletion(
        self, request: chat_pb2.CreateChatCompletionRequest, context: Any
    ) -> chat_pb2.CreateChatCompletionResponse:
        self.requests.append(request)
        choice = chat_pb2.Choice(content="".join(WORDS), finish_reason=chat_pb2.FINISH_REASON_STOP)
        header = chat_pb2.CompletionHeader(id=f"chatcmpl-{'0' * 32}", model=MODEL)
        return chat_pb2.CreateChatCompletionResponse(header=header, choices=[choice], usage=USAGE)


class ScriptedModels(model_pb2_grpc.ModelServiceServicer):
    """Lists one model."""

    async def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[_model()])

    async def GetModel(self, request: Any, context: Any) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=_model())


def _model() -> model_pb2.Model:
    return model_pb2.Model(id=MODEL, owned_by="tests", context_length=8192, revision="0123")


def scripted_server(chat: ScriptedChat) -> GrpcServer:
    """A server for `chat` and its model, not yet started."""
    return GrpcServer(
        [
            (chat_pb2_grpc.add_ChatServiceServicer_to_server, chat),
            (model_pb2_grpc.add_ModelServiceServicer_to_server, ScriptedModels()),
        ],
        NAMES,
    )
