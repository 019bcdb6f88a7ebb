"""Takes the docs' screenshots of the chat page: `python -m tests.browser.screenshots`.

The page and the facade are real; the model is scripted.
"""

import asyncio
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, async_playwright, expect

from tests.browser import chromium
from tests.rest_facade.conftest import facade
from tests.rest_facade.scripted_backend import ScriptedBackend, Step, delta, header, logprob
from trivium.chat.v1 import chat_pb2

FOLDER = Path(__file__).parents[2] / "docs" / "images"
PROSE = (
    "Sunlight holds all colours. Air scatters the short wavelengths most, with the fourth power of "
    "their frequency, so blue reaches the eye from every part of the sky."
)
SCHEMA = """{
  "type": "object",
  "required": ["colour", "wavelength_nm"]
}"""
LIST = '{"colour": "blue", "wavelength_nm": 470, "scattered_by": ["nitrogen", "oxygen"]}'


def script(text: str, seconds: float, thought: str = "", cached: int = 0) -> Sequence[Step]:
    """A scripted answer, word by word, with varying log-probabilities."""
    draw = random.Random(4)
    spent_thinking = 24 if thought else 0
    steps: list[Step] = [header(), 0.11]
    if thought:
        steps += [delta(reasoning_content=thought, tokens=spent_thinking)]
    words = re.findall(r"\s*\S+|\W", text)
    for count, word in enumerate(words, start=spent_thinking + 1):
        token = logprob(word, math.log(max(0.06, 1 - draw.expovariate(3.5))))
        token.top_logprobs.add(
            token=" grey", logprob=math.log(1.001 - math.exp(token.logprob)) - 0.4
        )
        steps += [seconds, delta(word, tokens=count, logprobs=[token])]
    spent = chat_pb2.Usage(
        prompt_tokens=58,
        completion_tokens=spent_thinking + len(words),
        reasoning_tokens=spent_thinking,
        cached_prompt_tokens=cached,
        device_nanoseconds=412_380_114,
    )
    return [*steps, delta(finish="STOP"), chat_pb2.StreamChatCompletionResponse(usage=spent)]


async def ask(page: Page, text: str) -> None:
    """Sends a message and waits for the end of the answer."""
    await page.get_by_label("Your message").fill(text)
    await page.keyboard.press("Enter")
    last = page.get_by_label("Answer", exact=True).last
    await expect(last).to_have_attribute("aria-busy", "false", timeout=30_000)


async def take(browser: Browser, backend: ScriptedBackend, url: str, name: str, **how: Any) -> None:
    """Takes one screenshot."""
    context = await browser.new_context(**how)
    page = await context.new_page()
    await page.goto(url)
    await expect(page.get_by_label("Model")).to_be_enabled()
    is_wide = how["viewport"]["width"] > 1000
    backend.script = script(PROSE, 0.03, thought="Rayleigh scattering.")
    await ask(page, "Why is the sky blue?")
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("System message").fill("You are brief and exact.")
    await page.get_by_label("Temperature").fill("0.7")
    await page.get_by_label("Seed").fill("7")
    await page.get_by_label("Token probabilities").check()
    await page.get_by_label("JSON schema").fill(SCHEMA)
    if not is_wide:
        await page.get_by_role("button", name="Done").click()
    backend.script = script(LIST, 0.03, cached=46)
    await ask(page, "The same as JSON, please.")
    await page.locator(".tokens :is(.p1, .p2)").first.hover()
    await page.get_by_label("Your message").fill("")
    await page.screenshot(path=FOLDER / f"{name}.png")
    await context.close()


async def main() -> None:
    """Takes them in light and dark mode, and as on a phone."""
    FOLDER.mkdir(exist_ok=True)
    backend = ScriptedBackend()
    backend.model_names = ["my-model"]
    await backend.start()
    async with facade(backend.port, {}) as url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(**chromium.launch_options())
        wide, narrow = {"width": 1240, "height": 760}, {"width": 390, "height": 760}
        await take(browser, backend, url, "chat-light", color_scheme="light", viewport=wide)
        await take(browser, backend, url, "chat-dark", color_scheme="dark", viewport=wide)
        await take(browser, backend, url, "chat-mobile", color_scheme="light", viewport=narrow)
        await browser.close()
    await backend.die()


if __name__ == "__main__":
    asyncio.run(main())
