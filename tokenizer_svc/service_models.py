"""ModelService and TokenizerService, which answer without calling a generator."""

from typing import Any

import grpc

from tokenizer_svc.convert.request import render_request
from tokenizer_svc.convert.response import timestamp
from tokenizer_svc.models import ServedModel, ServedModels
from tokenizer_svc.request.field_checks import check_token_ids
from tokenizer_svc.request.request_size import check_conversation_size
from tokenizer_svc.request.types import Conversation
from tokenizer_svc.request.validate_conversation import check_conversation
from tokenizer_svc.tokenizer import Tokenizer
from trivium.chat.v1 import model_pb2, model_pb2_grpc
from trivium.field_errors import check_array
from trivium.keys.keyed_request import current_request
from trivium.limits import MAX_TOKEN_IDS
from trivium.offload import INLINE_BYTES, offload
from trivium.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc

Call = grpc.aio.ServicerContext[Any, Any]


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """trivium.chat.v1.ModelService."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Call
    ) -> model_pb2.ListModelsResponse:
        self._models.check_any_available()
        caller = current_request()
        models = [each for each in self._models.available if caller.may_use(each.model.id)]
        return model_pb2.ListModelsResponse(models=map(_model, models))

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Call
    ) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=_model(self._models.find(request.id, "id")))


class TokenizerService(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """trivium.tokenizer.v1.TokenizerService."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    async def RenderChat(
        self, request: tokenizer_pb2.RenderChatRequest, context: Call
    ) -> tokenizer_pb2.RenderChatResponse:
        served = self._models.find(request.model)
        check_conversation_size(request)
        conversation = await offload(
            request.ByteSize(), lambda: _conversation(request), INLINE_BYTES
        )
        prompt = await served.prompt(conversation)
        response = tokenizer_pb2.RenderChatResponse(prompt=prompt.text, token_ids=prompt.token_ids)
        if request.return_token_strs:
            await _add_token_strings(response, served.model.tokenizer, prompt.token_ids)
        return response

    async def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: Call
    ) -> tokenizer_pb2.TokenizeResponse:
        tokenizer = self._models.find(request.model).model.tokenizer
        token_ids = await offload(
            len(request.text),
            lambda: tokenizer.encode(request.text, request.add_special_tokens, parse_special=True),
        )
        response = tokenizer_pb2.TokenizeResponse(token_ids=token_ids)
        if request.return_token_strs:
            await _add_token_strings(response, tokenizer, token_ids)
        return response

    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: Call
    ) -> tokenizer_pb2.DetokenizeResponse:
        model = self._models.find(request.model).model
        check_array("token_ids", request.token_ids, MAX_TOKEN_IDS)

        def decoded() -> str:
            token_ids = list(request.token_ids)
            check_token_ids("token_ids", token_ids, model.vocabulary_size)
            return model.tokenizer.decode(token_ids)

        text = await offload(len(request.token_ids), decoded)
        return tokenizer_pb2.DetokenizeResponse(text=text)

    async def GetTokenizerInfo(
        self, request: tokenizer_pb2.GetTokenizerInfoRequest, context: Call
    ) -> tokenizer_pb2.GetTokenizerInfoResponse:
        served = self._models.find(request.model)
        model = served.model
        named = model.template.named_tokens
        return tokenizer_pb2.GetTokenizerInfoResponse(
            vocabulary_size=model.vocabulary_size,
            context_length=served.context_length,
            chat_template=model.template.source,
            bos_token=named.get("bos_token", ""),
            eos_token=named.get("eos_token", ""),
            special_tokens=model.tokenizer.special_tokens,
        )


async def _add_token_strings(
    response: tokenizer_pb2.TokenizeResponse | tokenizer_pb2.RenderChatResponse,
    tokenizer: Tokenizer,
    token_ids: list[int],
) -> None:
    await offload(
        len(token_ids), lambda: response.token_strs.extend(tokenizer.token_strings(token_ids))
    )


def _model(served: ServedModel) -> model_pb2.Model:
    model = served.model
    return model_pb2.Model(
        id=model.id,
        create_time=timestamp(model.created),
        owned_by="trivium",
        context_length=served.context_length,
        revision=model.revision,
    )


def _conversation(request: tokenizer_pb2.RenderChatRequest) -> Conversation:
    conversation = render_request(request)
    check_conversation(conversation)
    return conversation
