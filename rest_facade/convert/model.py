"""Models."""

from rest_facade.answer import ModelList, ModelObject
from trivium.chat.v1 import model_pb2
from trivium.chat.v1.model_pb2_grpc import ModelServiceStub as ModelServiceStub


def models_request() -> model_pb2.ListModelsRequest:
    """Asks for all models."""
    return model_pb2.ListModelsRequest()


def model_request(model: str) -> model_pb2.GetModelRequest:
    """Asks for one model."""
    return model_pb2.GetModelRequest(id=model)


def model_list(response: model_pb2.ListModelsResponse) -> ModelList:
    """All models."""
    return ModelList(object="list", data=[model_object(model) for model in response.models])


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
