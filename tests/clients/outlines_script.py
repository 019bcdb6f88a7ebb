"""Outlines, in its modes for vLLM, SGLang and OpenAI: python outlines_script.py BASE_URL MODEL"""

import re
import sys
from typing import Literal

import openai
import outlines
from outlines.types import CFG, Regex
from pydantic import BaseModel, Field

base_url, name = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
question = "What is the weather in Paris?"


class Weather(BaseModel):
    """The weather of a day."""

    sky: Literal["clear", "grey"]
    degrees: int = Field(ge=0, le=40)


for model in (outlines.from_vllm(client, name), outlines.from_sglang(client, name)):
    Weather.model_validate_json(model(question, Weather, max_tokens=200))
    assert model(question, Literal["Paris", "Rome"], max_tokens=8) in ("Paris", "Rome")
    assert re.fullmatch("[a-z]{3}", model(question, Regex("[a-z]{3}"), max_tokens=8))
    Weather.model_validate_json("".join(model.stream(question, Weather, max_tokens=200)))

model = outlines.from_vllm(client, name)
assert model(question, CFG('start: "yes" | "no"'), max_tokens=8) in ("yes", "no")
published = outlines.from_openai(client, name)
Weather.model_validate_json(published(question, Weather, max_tokens=200))
print("all is well")
