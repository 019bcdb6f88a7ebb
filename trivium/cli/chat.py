"""`trivium chat`: a conversation in the terminal, with the tokens and times of each answer."""

from __future__ import annotations

import asyncio
import importlib
import signal
import ssl
import time
from collections.abc import Callable
from typing import Annotated

import httpx
import typer

from trivium.cli.answer import Answer, AnswerFailed, api_root, first_model, headers, http_error
from trivium.cli.https import CaFileOption, CertFileOption, KeyFileOption, tls_context

FAILED = 1
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
Message = dict[str, str]


class Conversation:
    """The messages so far, and where to send the next request."""

    def __init__(
        self,
        root: str,
        api_key: str | None,
        model: str,
        system: str | None,
        context: ssl.SSLContext,
    ) -> None:
        self._headers = headers(api_key)
        self._context = context
        self._url = f"{root}/chat/completions"
        self._model = model
        self.messages: list[Message] = (
            [{"role": "system", "content": system}] if system is not None else []
        )

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """Streams the answer to `show`. Raises AnswerFailed or httpx.HTTPError.

        Ctrl-C cancels the answer: the connection is closed, so that the server stops generating,
        and the text so far stays part of the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        answer = Answer(began=time.perf_counter())
        try:
            asyncio.run(self._listen(messages, answer, show))
        except (asyncio.CancelledError, KeyboardInterrupt):
            answer.finish_reason = "cancelled"
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    async def _listen(
        self, messages: list[Message], answer: Answer, show: Callable[[str], None]
    ) -> None:
        """Reads in a task that SIGINT cancels, as a blocking read might miss the signal."""
        reading = asyncio.create_task(self._read(messages, answer, show))
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, reading.cancel)
        await reading

    async def _read(
        self, messages: list[Message], answer: Answer, show: Callable[[str], None]
    ) -> None:
        body = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with (
            httpx.AsyncClient(
                headers=self._headers, timeout=TIMEOUT, trust_env=False, verify=self._context
            ) as client,
            client.stream("POST", self._url, json=body) as response,
        ):
            if response.status_code != 200:
                raise http_error(response.status_code, await response.aread())
            async for piece in response.aiter_raw():
                show(answer.push(piece, time.perf_counter()))
        if not answer.complete:
            raise AnswerFailed("the server ended the stream without [DONE]")


def footer(answer: Answer) -> str:
    """The answer's tokens, speed and device time, in one line."""
    parts = []
    if answer.finish_reason == "cancelled":
        parts.append("cancelled")
    parts.append(f"{answer.completion_tokens} tokens")
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.first_token_seconds is not None:
        parts.append(f"first after {answer.first_token_seconds * 1000:.0f} ms")
    if "gpu_seconds" in answer.usage:
        parts.append(f"{answer.usage['gpu_seconds']:.3f} gpu_seconds")
    return f"[{', '.join(parts)}]"


def chat(
    url: Annotated[str, typer.Option(help="Base URL, with or without /v1.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[
        str | None, typer.Option(help="Model to use. Default: the first in /v1/models.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    ca_file: CaFileOption = None,
    cert_file: CertFileOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Talks to a model. Ctrl-C cancels an answer, Ctrl-D or /exit leaves, /new starts over."""
    _enable_line_editing()
    root, context = api_root(url), tls_context(ca_file, cert_file, key_file)
    try:
        name = model or _first_model(root, api_key, context)
    except (AnswerFailed, httpx.HTTPError, httpx.InvalidURL) as error:
        typer.echo(f"trivium chat: {root}: {error or type(error).__name__}", err=True)
        raise typer.Exit(FAILED) from error
    typer.echo(f"{name} at {root}. Ctrl-C cancels an answer, Ctrl-D exits, /new starts over.")
    while _converse(Conversation(root, api_key, name, system, context)):
        pass


def _converse(conversation: Conversation) -> bool:
    """Questions and answers until the user leaves (False) or starts over (True)."""
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            typer.echo("  (Ctrl-D exits)")
            continue
        except EOFError:
            typer.echo()
            return False
        if question in ("/exit", "/quit"):
            return False
        if question == "/new":
            return True
        if not question:
            continue
        try:
            answer = conversation.ask(question, lambda text: typer.echo(text, nl=False))
            typer.echo(f"\n{typer.style(footer(answer), dim=True)}")
        except (AnswerFailed, httpx.HTTPError) as error:
            typer.echo(f"\n{typer.style(str(error) or type(error).__name__, fg='red')}")


def _first_model(root: str, api_key: str | None, context: ssl.SSLContext) -> str:
    with httpx.Client(
        headers=headers(api_key), timeout=TIMEOUT, trust_env=False, verify=context
    ) as client:
        response = client.get(f"{root}/models")
    return first_model(response.status_code, response.content)


def _enable_line_editing() -> None:
    """Importing readline gives input() arrow keys and history; some Pythons lack it."""
    try:
        importlib.import_module("readline")
    except ImportError:
        return
