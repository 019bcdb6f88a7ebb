"""A DNS server on loopback whose names have the addresses that a test gives them."""

import socketserver
import struct
import threading

_HEADER = struct.Struct("!6H")
_ANSWER, _NO_SUCH_NAME, _A, _IN = 0x8400, 3, 1, 1


class NameServer:
    """Answers questions for the A records of `addresses`, by name; NXDOMAIN where there is none.

    A context manager. The records may be changed at any time; their TTL is 0.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self._server = socketserver.UDPServer(("127.0.0.1", 0), self._handler())

    def target(self, name: str, port: int) -> str:
        """What a gRPC channel is opened to: `port` at every address of `name`."""
        return f"dns://127.0.0.1:{self._server.server_address[1]}/{name}:{port}"

    def __enter__(self) -> "NameServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        names = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                query, connection = self.request
                connection.sendto(names._answer(query), self.client_address)

        return Handler

    def _answer(self, query: bytes) -> bytes:
        number = _HEADER.unpack_from(query)[0]
        labels, position = [], _HEADER.size
        while length := query[position]:
            labels.append(query[position + 1 : position + 1 + length].decode())
            position += 1 + length
        kind = struct.unpack_from("!H", query, position + 1)[0]
        known = self.addresses.get(".".join(labels).lower(), [])
        records = [
            b"\xc0\x0c"  # the name in the question
            + struct.pack("!HHIH4B", _A, _IN, 0, 4, *map(int, address.split(".")))
            for address in (known if kind == _A else [])
        ]
        flags = _ANSWER | (0 if known else _NO_SUCH_NAME)
        header = _HEADER.pack(number, flags, 1, len(records), 0, 0)
        return header + query[_HEADER.size : position + 5] + b"".join(records)
