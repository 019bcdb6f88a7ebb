"""Hugging Face's InferenceClient: python hugging_face_script.py BASE_URL MODEL"""

import json
import sys
from typing import Any

from huggingface_hub import InferenceClient

base_url, model = sys.argv[1:]
client = InferenceClient(base_url=base_url, api_key="none", timeout=60)
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
CITIES = ["Paris", "Rome"]
arguments = {"type": "object", "properties": {"city": {"enum": CITIES}}, "required": ["city"]}
tools: Any = [
    {
        "type": "function",
        "function": {"name": "forecast", "description": "The weather", "parameters": arguments},
    }
]
sky = {"type": "object", "properties": {"sky": {"enum": ["clear", "grey"]}}, "required": ["sky"]}


def ask(**fields: Any) -> Any:
    return client.chat_completion(messages, model=model, **fields)


plain = ask(max_tokens=4, logprobs=True, top_logprobs=2, n=2, seed=1)
assert len(plain.choices) == 2
assert len(plain.choices[1].logprobs.content) == 4

# Its tool choice has no type, and its schema has TGI's format.
for choice in ("required", {"function": {"name": "forecast"}}):
    for call in ask(tools=tools, tool_choice=choice).choices[0].message.tool_calls:
        assert json.loads(call.function.arguments)["city"] in CITIES
schema = {"type": "json_schema", "json_schema": {"name": "sky", "schema": sky}}
answer = json.loads(ask(response_format=schema).choices[0].message.content)
assert answer in ({"sky": "clear"}, {"sky": "grey"}), answer

*chunks, last = ask(stream=True, max_tokens=4, stream_options={"include_usage": True})
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert last.usage.completion_tokens == 4
print("all is well")
