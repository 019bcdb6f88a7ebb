"""`python -m tests.tokenizer_svc.refusing_generator CODE`: refuses every call with this error.

Refuses before it has read the request, as a draining process does. Prints its port.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

from tests.tokenizer_svc.scripted_generator import ScriptedGenerator
from trivium.generator.v1 import generator_pb2 as pb
from trivium.wire.errors import ServiceError
from trivium.wire.serving import run


class RefusingGenerator(ScriptedGenerator):
    """Every refusal says when to retry."""

    def __init__(self, code: str) -> None:
        super().__init__("r1")
        self._code = code

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        raise ServiceError(self._code, "Not now.", retry_after=7)
        yield


async def main() -> None:
    _, port = await RefusingGenerator(sys.argv[1]).serve()
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    run(main())
