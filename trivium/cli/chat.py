"""`trivium chat`: a conversation in the terminal, with what each answer took."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import httpx
import typer

from trivium.cli.answer import Answer, AnswerFailed, api_root, error_message, headers

FAILED = 1
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
Message = dict[str, str]


class Conversation:
    """The messages so far, and how the next answer is asked for."""

    def __init__(self, client: httpx.Client, root: str, model: str, system: str | None) -> None:
        self._client = client
        self._url = f"{root}/chat/completions"
        self._model = model
        self.messages: list[Message] = (
            [{"role": "system", "content": system}] if system is not None else []
        )

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """Streams the answer to `show`. Raises AnswerFailed or httpx.HTTPError.

        A KeyboardInterrupt cancels the answer: the connection is closed, upon which the server
        stops, and what was said so far stays part of the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        answer = Answer(began=time.perf_counter())
        try:
            for piece in self._stream(messages):
                show(answer.push(piece, time.perf_counter()))
        except KeyboardInterrupt:
            answer.finish_reason = "cancelled"
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _stream(self, messages: list[Message]) -> Iterator[bytes]:
        body = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self._client.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise AnswerFailed(f"HTTP {response.status_code}: {_reason(response)}")
            yield from response.iter_raw()


def footer(answer: Answer) -> str:
    """What the answer took, in one line."""
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
    model: Annotated[str | None, typer.Option(help="Default: the first of /v1/models.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
) -> None:
    """Talks to a model. Ctrl-C cancels an answer, Ctrl-D or /exit leaves, /new starts over."""
    _enable_line_editing()
    root = api_root(url)
    with httpx.Client(headers=headers(api_key), timeout=TIMEOUT, trust_env=False) as client:
        try:
            name = model or _first_model(client, root)
        except (AnswerFailed, httpx.HTTPError) as error:
            typer.echo(f"trivium chat: {root}: {error or type(error).__name__}", err=True)
            raise typer.Exit(FAILED) from error
        typer.echo(f"{name} at {root}. Ctrl-C cancels an answer, Ctrl-D leaves, /new starts over.")
        while True:
            conversation = Conversation(client, root, name, system)
            if not _converse(conversation):
                return


def _converse(conversation: Conversation) -> bool:
    """Questions and answers until one leaves (False) or starts over (True)."""
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            typer.echo("  (Ctrl-D leaves)")
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


def _first_model(client: httpx.Client, root: str) -> str:
    response = client.get(f"{root}/models")
    if response.status_code != 200:
        raise AnswerFailed(f"HTTP {response.status_code}: {_reason(response)}")
    models = response.json().get("data") or []
    if not models:
        raise AnswerFailed("the server lists no model; name one with --model")
    return str(models[0]["id"])


def _reason(response: httpx.Response) -> str:
    try:
        return error_message(response.json())
    except ValueError:
        return response.text[:200]


def _enable_line_editing() -> None:
    """Importing readline gives input() arrow keys and history; some Pythons come without it."""
    try:
        importlib.import_module("readline")
    except ImportError:
        return
