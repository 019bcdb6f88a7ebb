"""Converts requests and responses about models and their tokenizers."""

from collections.abc import Iterable, Sequence

from rest_facade.convert import message
from rest_facade.requests.tokenization import TokenizeRequest
from rest_facade.responses import (
    DetokenizeResponse,
    ModelList,
    ModelObject,
    TokenizeResponse,
    TokenizerInfoResponse,
)
from trivium.chat.v1 import model_pb2
from trivium.chat.v1.model_pb2_grpc import ModelServiceStub as ModelServiceStub
from trivium.tokenizer.v1 import tokenizer_pb2
from trivium.tokenizer.v1.tokenizer_pb2_grpc import TokenizerServiceStub as TokenizerServiceStub

Model = model_pb2.Model
Models = model_pb2.ListModelsResponse
RenderRequest = tokenizer_pb2.RenderChatRequest
RenderResponse = tokenizer_pb2.RenderChatResponse
EncodeRequest = tokenizer_pb2.TokenizeRequest
EncodeResponse = tokenizer_pb2.TokenizeResponse
DecodeRequest = tokenizer_pb2.DetokenizeRequest
DecodeResponse = tokenizer_pb2.DetokenizeResponse
InfoRequest = tokenizer_pb2.GetTokenizerInfoRequest
InfoResponse = tokenizer_pb2.GetTokenizerInfoResponse


def render_request(body: TokenizeRequest, model: str) -> tokenizer_pb2.RenderChatRequest:
    """A request for the token ids of a conversation."""
    return tokenizer_pb2.RenderChatRequest(
        model=model,
        messages=message.messages(body.messages or ()),
        tools=message.tools(body.tools),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs or {},
        return_token_strs=body.return_token_strs,
    )


def tokenize_request(body: TokenizeRequest, model: str) -> tokenizer_pb2.TokenizeRequest:
    """A request for the token ids of a text."""
    return tokenizer_pb2.TokenizeRequest(
        model=model,
        text=body.prompt,
        add_special_tokens=body.add_special_tokens is not False,
        return_token_strs=body.return_token_strs,
    )


def detokenize_request(model: str, tokens: Sequence[int]) -> tokenizer_pb2.DetokenizeRequest:
    """A request for the text of token ids."""
    return tokenizer_pb2.DetokenizeRequest(model=model, token_ids=tokens)


def info_request(model: str) -> tokenizer_pb2.GetTokenizerInfoRequest:
    """A request for information about a model's tokenizer."""
    return tokenizer_pb2.GetTokenizerInfoRequest(model=model)


def tokenize_answer(
    response: EncodeResponse | RenderResponse, body: TokenizeRequest, context_length: int
) -> TokenizeResponse:
    """The token ids of a text or a conversation."""
    return TokenizeResponse(
        count=len(response.token_ids),
        max_model_len=context_length,
        tokens=list(response.token_ids),
        token_strs=list(response.token_strs) if body.return_token_strs else None,
    )


def detokenize_answer(response: tokenizer_pb2.DetokenizeResponse) -> DetokenizeResponse:
    """The text of token ids."""
    return DetokenizeResponse(prompt=response.text)


def info(response: tokenizer_pb2.GetTokenizerInfoResponse) -> TokenizerInfoResponse:
    """Information about a model's tokenizer."""
    return TokenizerInfoResponse(
        tokenizer_class="PreTrainedTokenizerFast",
        vocab_size=response.vocabulary_size,
        model_max_length=response.context_length,
        chat_template=response.chat_template or None,
        bos_token=response.bos_token or None,
        eos_token=response.eos_token or None,
        added_tokens_decoder={
            str(number): {"content": text, "special": True}
            for number, text in sorted(response.special_tokens.items())
        },
    )


def models_request() -> model_pb2.ListModelsRequest:
    """A request for all models."""
    return model_pb2.ListModelsRequest()


def model_request(model: str) -> model_pb2.GetModelRequest:
    """A request for one model."""
    return model_pb2.GetModelRequest(id=model)


def model_list(models: Iterable[model_pb2.Model]) -> ModelList:
    """A list of models."""
    return ModelList(object="list", data=[model_object(model) for model in models])


def model_object(model: model_pb2.Model) -> ModelObject:
    """One model."""
    return ModelObject(
        id=model.id,
        object="model",
        created=model.create_time.seconds,
        owned_by=model.owned_by,
        context_length=model.context_length,
        max_model_len=model.context_length,
    )
