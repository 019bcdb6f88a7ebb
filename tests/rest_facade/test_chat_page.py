"""The page at / in a real browser, with a scripted next stage."""

import asyncio
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from tests.browser import chromium
from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import (
    HELLO,
    MODEL,
    ScriptedBackend,
    call,
    delta,
    header,
    logprob,
    usage,
)
from trivium.chat.v1 import chat_pb2
from trivium.wire.errors import ServiceError

expect.set_options(timeout=20_000)
Open = Callable[..., Awaitable[Page]]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A headless Chromium."""
    options = chromium.launch_options()
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(**options)
        yield launched
        await launched.close()


@pytest.fixture
async def tab(browser: Browser) -> AsyncIterator[Open]:
    """Opens a facade's page. No tab may report errors or make requests to other servers."""
    complaints: list[str] = []
    urls: list[str] = []
    contexts: list[BrowserContext] = []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("request", lambda request: urls.append(request.url))

    async def open_tab(client: httpx.AsyncClient, **options: Any) -> Page:
        context = await browser.new_context(**options)
        contexts.append(context)
        page = await context.new_page()
        watch(page)
        await page.goto(str(client.base_url))
        return page

    yield open_tab
    for context in contexts:
        await context.close()
    # The browser itself logs every unsuccessful response.
    assert [] == [text for text in complaints if "Failed to load resource" not in text]
    assert all(re.match(r"http://127\.0\.0\.1:\d+/|data:", url) for url in urls), urls


@pytest.fixture
async def page(tab: Open, client: httpx.AsyncClient) -> Page:
    """The page of a facade with default settings, with its models."""
    opened = await tab(client)
    await expect(opened.get_by_label("Model")).to_be_enabled()
    return opened


async def ask(page: Page, text: str) -> None:
    """Types a message and presses Enter."""
    await page.get_by_label("Your message").fill(text)
    await page.keyboard.press("Enter")


def answer(page: Page) -> Any:
    """The last answer."""
    return page.get_by_label("Answer", exact=True).last


def conversation(request: Any) -> list[tuple[str, str]]:
    """A request's messages as roles and texts."""
    return [
        (chat_pb2.Role.Name(message.role)[5:].lower(), "".join(p.text for p in message.content))
        for message in request.messages
    ]


async def test_an_answer_is_shown_as_it_streams(page: Page, backend: ScriptedBackend) -> None:
    """Enter sends; text appears as it arrives, then the usage."""
    gate = asyncio.Event()
    backend.script = [HELLO[0], HELLO[1], gate, *HELLO[2:]]
    await ask(page, "Say it.")

    await expect(answer(page).locator(".text")).to_have_text("Hello")
    await expect(answer(page)).to_have_attribute("aria-busy", "true")
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    gate.set()
    await expect(answer(page).locator(".text")).to_have_text("Hello world")
    await expect(answer(page)).to_have_attribute("aria-busy", "false")
    costs = answer(page).locator(".stats")
    for words in ("tokens/s", "first token", "2 tokens", "prompt 7, 3 cached", "1.50 gpu_seconds"):
        await expect(costs).to_contain_text(words)
    await expect(page.get_by_role("status")).to_contain_text("Complete.")
    await expect(page.get_by_label("Your message")).to_be_focused()


async def test_the_whole_conversation_is_sent(page: Page, backend: ScriptedBackend) -> None:
    """A second question is sent with the first and its answer; New discards both."""
    for text in ("First.", "Second."):
        await ask(page, text)
        await expect(answer(page)).to_have_attribute("aria-busy", "false")
    await page.get_by_role("button", name="New").click()
    await expect(page.get_by_label("Answer", exact=True)).to_have_count(0)
    await ask(page, "Third.")
    await expect(answer(page)).to_have_attribute("aria-busy", "false")

    assert [
        [("user", "First.")],
        [("user", "First."), ("assistant", "Hello world"), ("user", "Second.")],
        [("user", "Third.")],
    ] == [conversation(request) for request in backend.requests]


async def test_settings_are_sent(page: Page, backend: ScriptedBackend) -> None:
    """Every setting arrives; empty fields are left to the model's defaults."""
    await ask(page, "Plain.")
    await expect(answer(page)).to_have_attribute("aria-busy", "false")
    await page.get_by_label("Model").select_option("org/other")
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("System message").fill("Be brief.")
    for label, value in (
        ("Temperature", "0.25"),
        ("Top p", "0.5"),
        ("Max tokens", "64"),
        ("Seed", "7"),
        ("JSON schema", '{"type": "integer"}'),
    ):
        await page.get_by_label(label).fill(value)
    await ask(page, "Tuned.")
    await expect(answer(page)).to_have_attribute("aria-busy", "false")
    plain, tuned = backend.requests

    assert not plain.options.sampling.ListFields()
    assert not plain.options.HasField("max_completion_tokens")
    assert not plain.options.HasField("response_format")
    assert "org/other" == tuned.model
    assert ("system", "Be brief.") == conversation(tuned)[0]
    assert {"temperature": 0.25, "topP": 0.5, "seed": "7"} == MessageToDict(tuned.options.sampling)
    assert 64 == tuned.options.max_completion_tokens
    schema = tuned.options.response_format.json_schema
    assert ('{"type":"integer"}', True) == (schema.schema, schema.strict)


async def test_invalid_json_is_not_sent(page: Page, backend: ScriptedBackend) -> None:
    """The field shows the problem, and the message is kept."""
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("JSON schema").fill('{"type": ')
    await ask(page, "Shall not be sent.")

    await expect(page.get_by_label("JSON schema")).to_be_focused()
    await expect(page.get_by_text("This is not JSON")).to_be_visible()
    await expect(page.get_by_label("Your message")).to_have_value("Shall not be sent.")
    assert [] == backend.requests


async def test_shift_enter_inserts_a_line_break(page: Page, backend: ScriptedBackend) -> None:
    """Messages may have several lines; blank messages are not sent."""
    await ask(page, "   ")
    await page.get_by_label("Your message").fill("one")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    assert [] == backend.requests
    await page.keyboard.press("Enter")

    await expect(answer(page)).to_have_attribute("aria-busy", "false")
    assert [("user", "one\ntwo")] == conversation(backend.requests[0])
    await expect(page.get_by_label("Your message")).to_have_value("")


@pytest.mark.parametrize("by", ["key", "button"])
async def test_an_answer_can_be_stopped(page: Page, backend: ScriptedBackend, by: str) -> None:
    """Esc or the button cancels the request, and the partial answer stays in the conversation."""
    backend.script = [header(), delta("Half an"), None]
    await ask(page, "Never ends.")
    await expect(answer(page).locator(".text")).to_have_text("Half an")
    if by == "key":
        await page.keyboard.press("Escape")
    else:
        await page.get_by_role("button", name="Stop").click()

    await asyncio.wait_for(backend.cancelled.wait(), 20)
    await expect(answer(page).locator(".stats")).to_contain_text("stopped")
    await expect(answer(page).locator(".stats")).to_contain_text("1 token")
    backend.script = HELLO
    await ask(page, "Go on.")
    await expect(answer(page).locator(".text")).to_have_text("Hello world")
    assert ("assistant", "Half an") in conversation(backend.requests[1])


async def test_a_refusal_is_shown(page: Page, backend: ScriptedBackend) -> None:
    """It shows the server's message, its code and when to retry; retrying then works."""
    backend.script = [ServiceError("queue_full", "The queue is full.", retry_after=7)]
    await ask(page, "Now?")
    failure = answer(page).get_by_role("alert")

    await expect(failure).to_contain_text("The queue is full.")
    await expect(failure).to_contain_text("HTTP 429 · queue_full · try again in 7 s")
    backend.script = HELLO
    await page.get_by_role("button", name="Try again").click()
    await expect(answer(page).locator(".text")).to_have_text("Hello world")
    assert [("user", "Now?")] == conversation(backend.requests[-1])


async def test_an_interrupted_answer_is_kept_with_its_error(
    page: Page, backend: ScriptedBackend
) -> None:
    """The partial answer is kept, together with the error that ended the stream."""
    backend.script = [header(), delta("Half"), ServiceError("backend_unavailable", "It is gone.")]
    await ask(page, "And?")

    await expect(answer(page).locator(".text")).to_have_text("Half")
    await expect(answer(page).get_by_role("alert")).to_contain_text("It is gone.")
    await expect(answer(page).get_by_role("alert")).to_contain_text("backend_unavailable")


async def test_an_error_listing_models_is_shown(
    tab: Open, start_facade: StartFacade, backend: ScriptedBackend
) -> None:
    """While the next stage is down the page shows the error and a button to retry."""
    await backend.die()
    client = await start_facade()
    opened = await tab(client)
    await expect(opened.get_by_role("alert")).to_contain_text("backend_unavailable")
    await backend.start()
    while not (await client.get("/health")).is_success:  # noqa: ASYNC110 - no event over HTTP
        await asyncio.sleep(0.1)
    await opened.get_by_role("button", name="Try again").click()

    await expect(opened.get_by_label("Model")).to_have_value(MODEL)


async def test_the_page_asks_for_an_api_key(
    tab: Open, start_facade: StartFacade, backend: ScriptedBackend, tmp_path: Path
) -> None:
    """The key is requested once, and again if it is wrong; it is kept for this tab only."""
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"secret").hexdigest())
    client = await start_facade(api_keys_file=keys)
    opened = await tab(client)
    dialog = opened.get_by_role("dialog")
    await expect(dialog).to_contain_text("This server requires an API key.")
    for key in ("wrong", "secret"):
        await dialog.get_by_label("API key").fill(key)
        await opened.keyboard.press("Enter")
        if key == "wrong":
            await expect(dialog).to_contain_text("does not accept this key")
    await expect(dialog).to_be_hidden()
    await expect(opened.get_by_label("Model")).to_be_enabled()
    await ask(opened, "Open?")
    await expect(answer(opened).locator(".text")).to_have_text("Hello world")
    await opened.reload()
    await expect(opened.get_by_label("Model")).to_be_enabled()
    await expect(dialog).to_be_hidden()

    other = await opened.context.new_page()
    await other.goto(opened.url)
    await expect(other.get_by_role("dialog")).to_be_visible()
    state = await opened.context.storage_state()
    assert {"cookies": [], "origins": []} == state
    await opened.get_by_role("button", name="Settings").click()
    await opened.get_by_role("button", name="Forget the API key").click()
    assert 0 == await opened.evaluate("sessionStorage.length")


async def test_reasoning_is_collapsed(page: Page, backend: ScriptedBackend) -> None:
    """It is shown on a click, and sent back to the model with the answer."""
    thought = delta(reasoning_content="Let me think.")
    backend.script = [header(), thought, delta("Four.", finish="STOP"), usage(9, 5)]
    await ask(page, "2 + 2?")
    summary = answer(page).get_by_text("Reasoning · 5 tokens")

    await expect(summary).to_be_visible()
    await expect(answer(page).get_by_text("Let me think.")).to_be_hidden()
    await summary.click()
    await expect(answer(page).get_by_text("Let me think.")).to_be_visible()
    await ask(page, "Sure?")
    await expect(page.get_by_label("Answer", exact=True)).to_have_count(2)
    await expect(answer(page)).to_have_attribute("aria-busy", "false")
    assert "Let me think." == backend.requests[1].messages[1].reasoning_content


async def test_tool_calls_are_shown_and_answered(page: Page, backend: ScriptedBackend) -> None:
    """Each call is shown with its arguments; results typed in are sent to the model."""
    backend.script = [
        header(),
        delta(tool_calls=[call("weather", '{"city":')]),
        delta(tool_calls=[call(arguments='"Paris"}')]),
        delta(tool_calls=[call("clock", "{}", position=1)], finish="TOOL_CALLS"),
        usage(),
    ]
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Tools").fill('[{"type": "function", "function": {"name": "weather"}}]')
    await ask(page, "What is it like?")
    await expect(page.get_by_label("Call to weather")).to_contain_text('{"city":"Paris"}')
    await expect(page.get_by_label("Call to clock")).to_contain_text("{}")
    await page.get_by_label("Result of weather").fill("Rain.")
    await page.get_by_label("Result of clock").fill("Noon.")
    backend.script = HELLO
    await page.get_by_role("button", name="Send the results").click()
    await expect(answer(page).locator(".text")).to_have_text("Hello world")
    first, second = backend.requests

    assert ["weather"] == [tool.function.name for tool in first.tools]
    calls = [(c.id, c.name, c.arguments) for c in second.messages[1].tool_calls]
    assert [("call_0", "weather", '{"city":"Paris"}'), ("call_1", "clock", "{}")] == calls
    assert [("tool", "Rain."), ("tool", "Noon.")] == conversation(second)[2:]
    assert ["call_0", "call_1"] == [message.tool_call_id for message in second.messages[2:]]


async def test_token_probabilities_are_shown_as_colours(
    page: Page, backend: ScriptedBackend
) -> None:
    """On demand, less likely tokens are darker, and the arrow keys show each one's alternatives.

    A character split into two tokens is shown whole.
    """
    euro = "€".encode()
    halves = [logprob("?", -0.01), logprob("?", -0.01)]
    for half, part in zip(halves, (euro[:1], euro[1:]), strict=True):
        half.bytes = part
    likely, rare = logprob("It", -0.01), logprob(" costs ", -3.0)
    backend.script = [
        header(),
        delta("It costs €", tokens=4, logprobs=[likely, rare, *halves], finish="STOP"),
        usage(4),
    ]
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Token probabilities").check()
    await ask(page, "How much?")
    tokens = answer(page).get_by_label("Tokens of the answer")
    await expect(tokens).to_have_text("It costs €")
    spans = await tokens.locator("span").evaluate_all("all => all.map(one => one.className)")
    await tokens.focus()
    await page.keyboard.press("ArrowRight")
    await page.keyboard.press("ArrowRight")
    await expect(answer(page)).to_contain_text('" costs " 5.0 %')

    assert ["token p0", "token p3", "token p0", "token p0"] == spans
    sent = backend.requests[0]
    assert (True, 5) == (sent.logprobs, sent.top_logprobs)
    await page.get_by_role("button", name="Probabilities").click()
    await expect(tokens).to_have_count(0)
    await expect(answer(page).locator(".text")).to_have_text("It costs €")


@pytest.mark.parametrize("language", ["curl", "Python"])
async def test_a_request_can_be_copied_as_code(
    page: Page, backend: ScriptedBackend, language: str, tmp_path: Path
) -> None:
    """The copied code runs unchanged and sends exactly what the page sent, including quotes."""
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Temperature").fill("0.5")
    await page.get_by_label("JSON schema").fill(
        '{"type": "object", "required": [], "x": [true, null]}'
    )
    await ask(page, 'It\'s "quoted" \\ and ${HOME}\n€ \N{GRINNING FACE}')
    await answer(page).get_by_role("button", name=language).click()
    await page.get_by_role("dialog").get_by_role("button", name="Copy").click()
    await expect(page.get_by_role("button", name="Copied")).to_be_visible()
    code = await page.evaluate("navigator.clipboard.readText()")
    command = ["sh", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ)
    )

    assert 0 == done.returncode, done.stderr
    assert "world" in done.stdout
    of_the_page, of_the_code = backend.requests
    assert MessageToDict(of_the_page) == MessageToDict(of_the_code)


async def test_text_is_never_rendered_as_html(page: Page, backend: ScriptedBackend) -> None:
    """A model's text is shown literally."""
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    backend.script = [
        header(),
        delta(reasoning_content=evil),
        delta(evil),
        delta(tool_calls=[call(evil, evil)], finish="TOOL_CALLS"),
        usage(),
    ]
    await ask(page, evil)
    await expect(answer(page)).to_have_attribute("aria-busy", "false")

    assert [0, 0] == [await page.locator(f"main {tag}").count() for tag in ("img", "script")]
    assert await page.get_by_text(evil).count() >= 4


async def test_the_policy_allows_only_the_pages_own_script(
    client: httpx.AsyncClient, browser: Browser
) -> None:
    """The policy allows the page's own script and style by hash, and nothing else."""
    policy = (await client.get("/")).headers["content-security-policy"]
    assert "unsafe" not in policy
    opened = await browser.new_page()
    await opened.goto(str(client.base_url))
    ran = await opened.evaluate(
        """async () => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const elsewhere = await fetch("http://127.0.0.1:9/").catch((error) => error.name);
            return [window.ran, elsewhere, getComputedStyle(document.body).display];
        }"""
    )

    assert [None, "TypeError", "grid"] == ran


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
async def test_the_page_is_accessible(
    tab: Open, client: httpx.AsyncClient, backend: ScriptedBackend, scheme: str, width: int
) -> None:
    """axe-core finds no problem with names, roles or contrast, light or dark, narrow or wide."""
    opened = await tab(
        client,
        color_scheme=scheme,
        viewport={"width": width, "height": 740},
        reduced_motion="reduce",
    )
    await expect(opened.get_by_label("Model")).to_be_enabled()
    await opened.get_by_role("button", name="Settings").click()
    await opened.get_by_label("Token probabilities").check()
    await opened.get_by_label("Tools").fill("[]")
    await opened.evaluate(chromium.axe())
    faults = [await opened.evaluate("axe.run()")]
    if width == 360:
        await opened.get_by_role("button", name="Done").click()
        await expect(opened.get_by_label("System message")).to_be_hidden()
    tokens = [logprob("Hello" * 30, value) for value in (-0.01, -0.5, -1.2, -4.0)]
    backend.script = [
        header(),
        delta(reasoning_content="So."),
        delta("Hello" * 120, logprobs=tokens),
        delta(tool_calls=[call("clock", "{}")], finish="TOOL_CALLS"),
        usage(),
    ]
    await ask(opened, "A long word? " + "o" * 200)
    await expect(answer(opened)).to_have_attribute("aria-busy", "false")
    faults.append(await opened.evaluate("axe.run()"))
    backend.script = [ServiceError("queue_full", "The queue is full.")]
    await ask(opened, "Again.")
    await expect(answer(opened)).to_have_attribute("aria-busy", "false")
    faults.append(await opened.evaluate("axe.run()"))
    wide = await opened.evaluate(
        "[document.documentElement.scrollWidth, log.scrollWidth - log.clientWidth]"
    )

    assert [] == [
        f"{fault['id']}: {node['html']} {node['failureSummary']}"
        for found in faults
        for fault in found["violations"]
        for node in fault["nodes"]
    ]
    assert [width, 0] == wide


async def test_the_page_can_be_disabled(start_facade: StartFacade) -> None:
    """/ is then an unknown URL; by default it is a page that needs no key."""
    shown = await (await start_facade()).get("/")
    refused = await (await start_facade(chat_page=False)).get("/")

    assert (200, "text/html; charset=utf-8") == (shown.status_code, shown.headers["content-type"])
    assert 404 == refused.status_code
    assert "unknown_url" == refused.json()["error"]["code"]
