"""Streams an answer with OpenAI's client:  python examples/python_openai.py [URL] [QUESTION]

Needs `pip install openai`. If the server requires an API key, it is read from OPENAI_API_KEY.
"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
question = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"

client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": question}],
    temperature=0,
    max_completion_tokens=100,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        usage = chunk.usage
        print(
            f"\n[{usage.prompt_tokens} + {usage.completion_tokens} tokens, "
            f"{usage.gpu_seconds:.3f} gpu_seconds]"
        )
