"""Streams an answer over gRPC:  python examples/python_grpc.py [HOST:PORT] [QUESTION]

Needs `pip install trivium` (for the stubs), or stubs that you generate from protos/.
"""

import sys

import grpc

from trivium.chat.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc
from trivium.sampling.v1.sampling_pb2 import SamplingParams

target = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
question = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"

with grpc.insecure_channel(target) as channel:
    models = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    request = chat_pb2.CreateChatCompletionRequest(
        model=models.models[0].id,
        messages=[
            chat_pb2.ChatMessage(
                role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=question)]
            )
        ],
        options=chat_pb2.CompletionOptions(
            sampling=SamplingParams(temperature=0), max_completion_tokens=100
        ),
    )
    chat = chat_pb2_grpc.ChatServiceStub(channel)
    for event in chat.StreamChatCompletion(request, timeout=120):
        if event.HasField("delta"):
            print(event.delta.content, end="", flush=True)
        elif event.HasField("usage"):
            usage = event.usage
            print(
                f"\n[{usage.prompt_tokens} + {usage.completion_tokens} tokens, "
                f"{usage.device_nanoseconds / 1e9:.3f} gpu_seconds]"
            )
