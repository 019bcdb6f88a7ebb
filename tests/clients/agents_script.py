"""OpenAI's Agents SDK over chat completions: python agents_script.py BASE_URL MODEL"""

import asyncio
import sys
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

base_url, name = sys.argv[1:]
set_tracing_disabled(True)
asked = []


class Weather(BaseModel):
    """The weather of a day."""

    sky: Literal["clear", "grey"]
    degrees: int = Field(ge=0, le=40)


@function_tool
def forecast(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    asked.append(city)
    return "Sunny"


async def main() -> None:
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        model = OpenAIChatCompletionsModel(model=name, openai_client=client)

        def agent(**settings: Any) -> Agent:
            return Agent(
                name="forecaster",
                model=model,
                tools=[forecast],
                model_settings=ModelSettings(
                    max_tokens=100, parallel_tool_calls=False, include_usage=True, **settings
                ),
            )

        # A forced call is executed and its result answered; then the same as a stream.
        question = "What is the weather in Paris?"
        done = await Runner.run(agent(tool_choice="required"), question)
        kinds = {item.type for item in done.new_items}
        assert {"tool_call_item", "tool_call_output_item", "message_output_item"} <= kinds, kinds
        assert done.raw_responses[0].usage.output_tokens > 0

        streamed = Runner.run_streamed(agent(tool_choice="forecast"), question)
        events = [event async for event in streamed.stream_events()]
        types = {event.data.type for event in events if event.type == "raw_response_event"}
        assert {"response.function_call_arguments.delta", "response.completed"} <= types, types
        assert set(asked) <= {"Paris", "Rome"}
        assert len(asked) >= 2

        typed = Agent(name="typed", model=model, output_type=Weather)
        assert isinstance((await Runner.run(typed, question)).final_output, Weather)

        # A handoff is a tool that the framework defines.
        other = Agent(name="other", model=model, model_settings=ModelSettings(max_tokens=8))
        first = Agent(
            name="first",
            model=model,
            handoffs=[other],
            model_settings=ModelSettings(max_tokens=100, tool_choice="required"),
        )
        assert (await Runner.run(first, question)).last_agent.name == "other"


asyncio.run(main())
print("all is well")
