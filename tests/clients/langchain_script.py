"""LangChain: python langchain_script.py BASE_URL MODEL"""

import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

base_url, model = sys.argv[1:]
chat = ChatOpenAI(base_url=base_url, model=model, api_key="none", max_retries=0)
question = HumanMessage("What is the weather in Paris?")


class Weather(BaseModel):
    """The weather of a day."""

    sky: Literal["clear", "grey"]
    degrees: int = Field(ge=0, le=40)


@tool
def forecast(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """The weather in a city."""
    return f"Sunny in {city} for {days} days"


assert isinstance(chat.bind(max_tokens=8).invoke([question]).content, str)

for method in ("json_schema", "function_calling"):
    answer: Any = chat.with_structured_output(Weather, method=method).invoke([question])
    assert isinstance(answer, Weather), answer

called: Any = chat.bind_tools([forecast], tool_choice="any").invoke([question])
assert [call["name"] for call in called.tool_calls] == ["forecast"] * len(called.tool_calls)
assert called.tool_calls
results = [
    ToolMessage(forecast.invoke(call["args"]), tool_call_id=call["id"])
    for call in called.tool_calls
]
after = chat.bind_tools([forecast], tool_choice="none").bind(max_tokens=8)
assert isinstance(after.invoke([question, called, *results]).content, str)

whole: Any = None
for chunk in chat.bind_tools([forecast], tool_choice="forecast").stream(
    [question], stream_usage=True
):
    whole = chunk if whole is None else whole + chunk
assert whole.tool_calls[0]["name"] == "forecast"
assert forecast.invoke(whole.tool_calls[0]["args"]).startswith("Sunny")
assert whole.usage_metadata["output_tokens"] > 0
print("all is well")
