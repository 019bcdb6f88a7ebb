"""A scripted OpenAI-compatible server, for the commands that are clients."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


@dataclass
class ScriptedServer:
    """Sends "word " for each token; records all request bodies and whether a stream was cut."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    cut: threading.Event = field(default_factory=threading.Event)
    models_status: int = 200
    tokens_before_silence: int | None = None
    refusal: tuple[int, str] | None = None
    breaks_off: bool = False
    stops_short: bool = False  # without [DONE], as behind a proxy that lost the server
    models: str = json.dumps({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> Response:
            return Response(self.models, self.models_status)

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            if self.refusal is not None:
                status, message = self.refusal
                return JSONResponse({"error": {"message": message}}, status)
            if body["stream"]:
                return StreamingResponse(self._stream(body), media_type="text/event-stream")
            return JSONResponse({"choices": [], "usage": self._usage(body)})

        return app

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        words = sum(len(message["content"].split()) for message in body["messages"])
        tokens = body.get("max_tokens", 4)
        return {
            "prompt_tokens": 10 + 2 * words,
            "completion_tokens": tokens,
            "gpu_seconds": 0.25,
            "prompt_tokens_details": {"cached_tokens": 3},
        }

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            yield _event({"delta": {"role": "assistant", "content": ""}})
            for number in range(body.get("max_tokens", 4)):
                if number == self.tokens_before_silence:
                    await asyncio.Event().wait()
                yield _event({"delta": {"content": "word "}})
            if self.breaks_off:
                yield 'data: {"error": {"message": "the generator is gone"}}\n\n'
                return
            if self.stops_short:
                return
            yield _event({"delta": {}, "finish_reason": "length"})
            yield f"data: {json.dumps({'choices': [], 'usage': self._usage(body)})}\n\n"
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.cut.set()
            raise


def _event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"
