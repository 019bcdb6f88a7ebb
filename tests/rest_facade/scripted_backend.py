"""A next stage that follows a test's script, over real gRPC on loopback."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tests.ports import free_port
from trivium.chat.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    completion_pb2,
    completion_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from trivium.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from trivium.wire.errors import ServiceError
from trivium.wire.serving import GrpcServer
from trivium.wire.tls.server import ServerTls

MODEL = "scripted"
CHAT_SERVICE = "trivium.chat.v1.ChatService"
MODEL_SERVICE = "trivium.chat.v1.ModelService"
COMPLETION_SERVICE = "trivium.chat.v1.CompletionService"
TOKENIZER_SERVICE = "trivium.tokenizer.v1.TokenizerService"

# Steps of a script: an event is sent, an asyncio.Event is awaited, a number of seconds is slept, an
# exception is raised, and None waits forever.
Message = chat_pb2.StreamChatCompletionResponse | completion_pb2.StreamCompletionResponse
Step = Message | asyncio.Event | float | Exception | None


def header(*prompts: Sequence[int]) -> chat_pb2.StreamChatCompletionResponse:
    """The header of every scripted answer; `prompts` are the tokens of each prompt."""
    event = chat_pb2.StreamChatCompletionResponse()
    event.header.id = "chatcmpl-" + "0" * 32
    event.header.create_time.seconds = 1_700_000_000
    event.header.model = MODEL
    event.header.system_fingerprint = "fp_scripted"
    event.header.prompt_tokens = 7
    event.header.prompts.extend(chat_pb2.PromptTokens(ids=ids) for ids in prompts)
    return event


def delta(
    content: str = "", index: int = 0, tokens: int = 1, finish: str = "", **fields: Any
) -> chat_pb2.StreamChatCompletionResponse:
    """New text; `finish` is empty, STOP, LENGTH or TOOL_CALLS."""
    event = chat_pb2.StreamChatCompletionResponse()
    event.delta.CopyFrom(
        chat_pb2.ChoiceDelta(index=index, content=content, completion_tokens=tokens, **fields)
    )
    if finish:
        event.delta.finish_reason = chat_pb2.FinishReason.Value(f"FINISH_REASON_{finish}")
    return event


def call(name: str | None = None, arguments: str = "", position: int = 0) -> chat_pb2.ToolCallDelta:
    """A piece of a tool call; the first one has the name."""
    piece = chat_pb2.ToolCallDelta(index=position, name=name, arguments=arguments)
    if name is not None:
        piece.id = f"call_{position}"
    return piece


def text_delta(
    text: str = "", index: int = 0, tokens: int = 1, finish: str = "", **fields: Any
) -> completion_pb2.StreamCompletionResponse:
    """New text of a plain completion."""
    event = completion_pb2.StreamCompletionResponse()
    event.delta.CopyFrom(
        completion_pb2.CompletionDelta(index=index, text=text, completion_tokens=tokens, **fields)
    )
    if finish:
        event.delta.finish_reason = chat_pb2.FinishReason.Value(f"FINISH_REASON_{finish}")
    return event


def text_logprob(token: chat_pb2.TokenLogprob | None, offset: int) -> Any:
    """A plain completion's token and the offset of its text; None is the first token of an echo."""
    return completion_pb2.CompletionTokenLogprob(token=token, text_offset=offset)


def usage(
    completion_tokens: int = 2, reasoning_tokens: int = 0
) -> chat_pb2.StreamChatCompletionResponse:
    """The usage of every scripted answer."""
    event = chat_pb2.StreamChatCompletionResponse()
    event.usage.CopyFrom(
        chat_pb2.Usage(
            prompt_tokens=7,
            completion_tokens=completion_tokens,
            reasoning_tokens=reasoning_tokens,
            cached_prompt_tokens=3,
            device_nanoseconds=1_500_000_000,
        )
    )
    return event


def logprob(token: str, value: float = -0.5) -> chat_pb2.TokenLogprob:
    """A token's log-probability, with itself as the only alternative."""
    top = chat_pb2.TopLogprob(token=token, logprob=value, bytes=token.encode())
    return chat_pb2.TokenLogprob(
        token=token, logprob=value, bytes=token.encode(), top_logprobs=[top]
    )


def prompt_position(*ranked: tuple[int, str, float, int]) -> chat_pb2.PromptPosition:
    """A position of the prompt, with id, text, log-probability and rank of its tokens."""
    names = ("token_id", "token", "logprob", "rank")
    tokens = [chat_pb2.PromptLogprob(**dict(zip(names, one, strict=True))) for one in ranked]
    return chat_pb2.PromptPosition(tokens=tokens)


SCORED = (prompt_position(), prompt_position((5, "é", -3.5, 77), (9, "a", -0.25, 1)))
SCORED_JSON = [
    None,
    {
        "5": {"logprob": -3.5, "rank": 77, "decoded_token": "é"},
        "9": {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
    },
]

HELLO: Sequence[Step] = (
    header(range(7)),
    delta("Hello"),
    delta(" world", tokens=2),
    delta(tokens=2, finish="STOP"),
    usage(),
)


HELLO_TEXT: Sequence[Step] = (
    header(range(7)),
    text_delta("Hello"),
    text_delta(" world", tokens=2),
    text_delta(tokens=2, finish="STOP"),
    usage(),
)


class ScriptedBackend(
    chat_pb2_grpc.ChatServiceServicer,
    completion_pb2_grpc.CompletionServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    tokenizer_pb2_grpc.TokenizerServiceServicer,
):
    """Plays `script` for every chat and `text_script` for every plain completion, and records the
    requests. A text's tokens are its characters' code points."""

    def __init__(self, tls: ServerTls | None = None) -> None:
        self._tls = tls
        self.script: Sequence[Step] = HELLO
        self.text_script: Sequence[Step] = HELLO_TEXT
        self.prompt_logprobs: Sequence[chat_pb2.PromptPosition] = ()
        self.model_names = [MODEL, "org/other"]
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.deadlines: list[float | None] = []
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.port = free_port()
        self._server: GrpcServer | None = None

    async def start(self) -> None:
        """Serves, on the same port as before."""
        self._server = GrpcServer(
            [
                (chat_pb2_grpc.add_ChatServiceServicer_to_server, self),
                (completion_pb2_grpc.add_CompletionServiceServicer_to_server, self),
                (model_pb2_grpc.add_ModelServiceServicer_to_server, self),
                (tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, self),
            ],
            [CHAT_SERVICE, COMPLETION_SERVICE, MODEL_SERVICE, TOKENIZER_SERVICE],
            tls=self._tls,
        )
        await self._server.start(f"127.0.0.1:{self.port}")
        self._server.set_serving(True)

    def set_serving(self, serving: bool) -> None:
        """Sets the health of the services that need a generator."""
        assert self._server is not None
        needing = [CHAT_SERVICE, COMPLETION_SERVICE, MODEL_SERVICE]
        self._server.set_serving(serving, needing)

    async def die(self) -> None:
        """Stops at once, whatever is running."""
        if self._server is not None:
            await self._server._server.stop(None)  # a drain would refuse politely
            self._server = None

    async def StreamChatCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._note(request, context)
        async for event in self._play(self.script):
            yield event

    async def CreateChatCompletion(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        response = chat_pb2.CreateChatCompletionResponse(prompt_logprobs=self.prompt_logprobs)
        choices: dict[int, chat_pb2.Choice] = {}
        async for event in self._play(self.script):
            if event.HasField("header"):
                response.header.CopyFrom(event.header)
            elif event.HasField("usage"):
                response.usage.CopyFrom(event.usage)
            else:
                index = event.delta.index
                _add(choices.setdefault(index, chat_pb2.Choice(index=index)), event.delta)
        response.choices.extend(choices[index] for index in sorted(choices))
        return response

    async def StreamCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._note(request, context)
        async for event in self._play(self.text_script):
            yield _as_text(event)

    async def CreateCompletion(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        response = completion_pb2.CreateCompletionResponse()
        choices: dict[int, completion_pb2.CompletionChoice] = {}
        async for event in self._play(self.text_script):
            if event.HasField("header"):
                response.header.CopyFrom(_as_text(event).header)
            elif event.HasField("usage"):
                response.usage.CopyFrom(event.usage)
            else:
                delta = event.delta
                choice = choices.setdefault(
                    delta.index, completion_pb2.CompletionChoice(index=delta.index)
                )
                choice.text += delta.text
                choice.logprobs.extend(delta.logprobs)
                choice.finish_reason = delta.finish_reason
                choice.token_ids.extend(delta.token_ids)
        if 0 in choices:
            choices[0].prompt_logprobs.extend(self.prompt_logprobs)
        response.choices.extend(choices[index] for index in sorted(choices))
        return response

    async def ListModels(self, request: Any, context: Any) -> Any:
        return model_pb2.ListModelsResponse(models=map(_model, self.model_names))

    async def GetModel(self, request: Any, context: Any) -> Any:
        self._check_model(request.id)
        return model_pb2.GetModelResponse(model=_model(request.id))

    async def RenderChat(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        prompt = "".join(part.text for message in request.messages for part in message.content)
        return tokenizer_pb2.RenderChatResponse(
            prompt=prompt, token_ids=map(ord, prompt), token_strs=prompt
        )

    async def Tokenize(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        return tokenizer_pb2.TokenizeResponse(
            token_ids=map(ord, request.text), token_strs=request.text
        )

    async def Detokenize(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        if any(token > 0xD7FF for token in request.token_ids):
            raise ServiceError("invalid_value", "Not in token_ids.", "token_ids[0]")
        return tokenizer_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    async def GetTokenizerInfo(self, request: Any, context: Any) -> Any:
        return tokenizer_pb2.GetTokenizerInfoResponse(
            vocabulary_size=0xD800,
            context_length=2048,
            chat_template="{{ messages }}",
            eos_token="<end>",
            special_tokens={3: "<end>"},
        )

    def _check_model(self, name: str) -> None:
        if name not in self.model_names:
            raise ServiceError("model_not_found", f"The model '{name}' does not exist.", "id")

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())

    async def _play(self, script: Sequence[Step]) -> AsyncIterator[Any]:
        self.started.set()
        try:
            for step in script:
                if isinstance(step, Message):
                    yield step
                else:
                    await _pause(step)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise


def _add(choice: chat_pb2.Choice, delta: chat_pb2.ChoiceDelta) -> None:
    """Appends a delta to `choice`."""
    choice.content += delta.content
    choice.reasoning_content += delta.reasoning_content
    choice.logprobs.extend(delta.logprobs)
    choice.finish_reason = delta.finish_reason
    choice.token_ids.extend(delta.token_ids)
    for piece in delta.tool_calls:
        if piece.HasField("id"):
            choice.tool_calls.add(id=piece.id, name=piece.name)
        choice.tool_calls[piece.index].arguments += piece.arguments


def _as_text(event: Any) -> completion_pb2.StreamCompletionResponse:
    """A chat's header or usage as that of a plain completion."""
    if isinstance(event, completion_pb2.StreamCompletionResponse):
        return event
    same = completion_pb2.StreamCompletionResponse.FromString(b"")
    if event.HasField("header"):
        same.header.CopyFrom(event.header)
        same.header.id = "cmpl-" + "0" * 32
    else:
        same.usage.CopyFrom(event.usage)
    return same


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
