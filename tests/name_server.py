"""A name server on loopback with records that a test sets and may change."""

import asyncio
import ipaddress
import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Self

_RESPONSE, _NO_SUCH_NAME = 0x8580, 3
_A, _AAAA, _IN = 1, 28, 1
_POINTER_TO_QUESTION_NAME = 0xC00C
_HEADER = struct.Struct("!6H")


class NameServer:
    """Answers A and AAAA queries from `names`, each name's IP addresses; other names do not exist.

    A context manager; UDP only. Names may change at any time, so the TTL is 0. Queries for a name
    in `unanswered` are counted there and get no answer.
    """

    def __init__(self, **names: Sequence[str]) -> None:
        self.names: dict[str, Sequence[str]] = dict(names)
        self.unanswered: dict[str, int] = {}
        self._unseen: Counter[str] = Counter()  # queries until a change has been applied
        self._seen = threading.Event()
        self._server = socketserver.UDPServer(("127.0.0.1", 0), self._handler())
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def target(self, name: str, port: int) -> str:
        """A gRPC channel's target: `port` at every address of `name`."""
        return f"dns://127.0.0.1:{self.port}/{name}:{port}"

    async def change(self, name: str, *addresses: str) -> None:
        """Changes a name's addresses, and returns once the resolver has applied the change.

        That is known when it asks again.
        """
        self.names[name] = addresses
        self._unseen = Counter({name: 2})
        self._seen.clear()
        await asyncio.to_thread(self._seen.wait)

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        names = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                query, connection = self.request
                if answer := names._answer(query):
                    connection.sendto(answer, self.client_address)

        return Handler

    def _note(self, name: str) -> None:
        if self._unseen[name] > 0:
            self._unseen[name] -= 1
            if not self._unseen[name]:
                self._seen.set()

    def _answer(self, query: bytes) -> bytes | None:
        labels, position = [], _HEADER.size
        while length := query[position]:
            labels.append(query[position + 1 : position + 1 + length])
            position += 1 + length
        (kind,) = struct.unpack_from("!H", query, position + 1)
        name = b".".join(labels).decode().lower()
        if name in self.unanswered:
            self.unanswered[name] += 1
            return None
        if kind == _A:  # most also ask for AAAA
            self._note(name)
        known = self.names.get(name)
        packed = [ipaddress.ip_address(address).packed for address in known or ()]
        records = [
            struct.pack("!HHHIH", _POINTER_TO_QUESTION_NAME, kind, _IN, 0, len(address)) + address
            for address in packed
            if kind == {4: _A, 16: _AAAA}[len(address)]
        ]
        flags = _RESPONSE | (0 if known else _NO_SUCH_NAME)
        (number,) = struct.unpack_from("!H", query)
        header = _HEADER.pack(number, flags, 1, len(records), 0, 0)
        return header + query[_HEADER.size : position + 5] + b"".join(records)
