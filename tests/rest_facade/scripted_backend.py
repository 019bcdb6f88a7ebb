"""A next stage that does what a test says, over real gRPC on the loopback interface."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from trivium.chat.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc
from trivium.wire.errors import ServiceError
from trivium.wire.serving import GrpcServer

MODEL = "scripted"
CHAT_SERVICE = "trivium.chat.v1.ChatService"
MODEL_SERVICE = "trivium.chat.v1.ModelService"

# What a script is made of: an event is sent, an asyncio.Event is waited for, a number of seconds
# is slept, an exception is raised, and None waits for ever.
Step = chat_pb2.StreamChatCompletionResponse | asyncio.Event | float | Exception | None


def header() -> chat_pb2.StreamChatCompletionResponse:
    """The header of every scripted answer."""
    event = chat_pb2.StreamChatCompletionResponse()
    event.header.id = "chatcmpl-" + "0" * 32
    event.header.create_time.seconds = 1_700_000_000
    event.header.model = MODEL
    event.header.system_fingerprint = "fp_scripted"
    event.header.prompt_tokens = 7
    return event


def delta(
    content: str = "", index: int = 0, tokens: int = 1, finish: str = "", **fields: Any
) -> chat_pb2.StreamChatCompletionResponse:
    """New text; `finish` is empty, STOP or LENGTH."""
    event = chat_pb2.StreamChatCompletionResponse()
    event.delta.CopyFrom(
        chat_pb2.ChoiceDelta(index=index, content=content, completion_tokens=tokens, **fields)
    )
    if finish:
        event.delta.finish_reason = chat_pb2.FinishReason.Value(f"FINISH_REASON_{finish}")
    return event


def usage(completion_tokens: int = 2) -> chat_pb2.StreamChatCompletionResponse:
    """What every scripted answer costs."""
    event = chat_pb2.StreamChatCompletionResponse()
    event.usage.CopyFrom(
        chat_pb2.Usage(
            prompt_tokens=7,
            completion_tokens=completion_tokens,
            cached_prompt_tokens=3,
            device_nanoseconds=1_500_000_000,
        )
    )
    return event


def logprob(token: str, value: float = -0.5) -> chat_pb2.TokenLogprob:
    """A token's log-probability, with itself as the only alternative."""
    top = chat_pb2.TopLogprob(token=token, logprob=value, token_bytes=token.encode())
    return chat_pb2.TokenLogprob(
        token=token, logprob=value, token_bytes=token.encode(), top_logprobs=[top]
    )


HELLO: Sequence[Step] = (
    header(),
    delta("Hello"),
    delta(" world", tokens=2),
    delta(tokens=2, finish="STOP"),
    usage(),
)


class ScriptedBackend(chat_pb2_grpc.ChatServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Plays `script` for every completion, and remembers what it was asked."""

    def __init__(self) -> None:
        self.script: Sequence[Step] = HELLO
        self.requests: list[chat_pb2.CreateChatCompletionRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.deadlines: list[float | None] = []
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.port = 0
        self._server: GrpcServer | None = None

    async def start(self) -> None:
        """Serves, on the same port as before if there was one."""
        self._server = GrpcServer(
            [
                (chat_pb2_grpc.add_ChatServiceServicer_to_server, self),
                (model_pb2_grpc.add_ModelServiceServicer_to_server, self),
            ],
            [CHAT_SERVICE, MODEL_SERVICE],
        )
        self.port = await self._server.start(f"127.0.0.1:{self.port}")
        await self._server.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """What its health service says."""
        assert self._server is not None
        await self._server.set_serving(serving)

    async def die(self) -> None:
        """Ends at once, whatever runs."""
        if self._server is not None:
            await self._server.drain(0, 0)
            self._server = None

    async def StreamChatCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._note(request, context)
        async for event in self._play():
            yield event

    async def CreateChatCompletion(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        response = chat_pb2.CreateChatCompletionResponse()
        choices: dict[int, chat_pb2.Choice] = {}
        async for event in self._play():
            if event.HasField("header"):
                response.header.CopyFrom(event.header)
            elif event.HasField("usage"):
                response.usage.CopyFrom(event.usage)
            else:
                choice = choices.setdefault(
                    event.delta.index, chat_pb2.Choice(index=event.delta.index)
                )
                choice.content += event.delta.content
                choice.logprobs.extend(event.delta.logprobs)
                choice.finish_reason = event.delta.finish_reason
        response.choices.extend(choices[index] for index in sorted(choices))
        return response

    async def ListModels(self, request: Any, context: Any) -> Any:
        return model_pb2.ListModelsResponse(models=[_model(MODEL), _model("org/other")])

    async def GetModel(self, request: Any, context: Any) -> Any:
        if request.id not in (MODEL, "org/other"):
            raise ServiceError("model_not_found", f"The model '{request.id}' does not exist.")
        return model_pb2.GetModelResponse(model=_model(request.id))

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())

    async def _play(self) -> AsyncIterator[chat_pb2.StreamChatCompletionResponse]:
        self.started.set()
        try:
            for step in self.script:
                if isinstance(step, chat_pb2.StreamChatCompletionResponse):
                    yield step
                else:
                    await _pause(step)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise


async def _pause(step: asyncio.Event | float | Exception | None) -> None:
    match step:
        case None:
            await asyncio.get_running_loop().create_future()
        case asyncio.Event():
            await step.wait()
        case Exception():
            raise step
        case _:
            await asyncio.sleep(step)


def _model(name: str) -> model_pb2.Model:
    model = model_pb2.Model(id=name, owned_by="trivium", context_length=2048, revision="r1")
    model.create_time.seconds = 1_600_000_000
    return model
