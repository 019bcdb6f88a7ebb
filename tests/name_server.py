"""A name server on the loopback interface that knows what a test says, and may change its mind."""

import asyncio
import contextlib
import socket
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence

_RESPONSE, _NAME_ERROR = 0x8180, 0x8183
_A, _IN, _TTL_SECONDS = 1, 1, 1
_NAME_OF_THE_QUESTION = 0xC00C


class NameServer(asyncio.DatagramProtocol):
    """Answers A queries by `names`, a name's IPv4 addresses; other names do not exist."""

    def __init__(self, **names: Sequence[str]) -> None:
        self.names: dict[str, Sequence[str]] = dict(names)
        self.port = 0
        self._asked: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._transport: asyncio.DatagramTransport | None = None

    async def change(self, name: str, *addresses: str) -> None:
        """Gives a name other addresses, and returns when whoever asks for it has taken them in.

        That is known when it asks again.
        """
        self.names[name] = addresses
        for _ in range(2):
            self._asked[name] = asyncio.Event()
            await self._asked[name].wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["NameServer"]:
        """Listens on `port` of 127.0.0.1, over UDP alone."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=("127.0.0.1", 0)
        )
        self.port = self._transport.get_extra_info("sockname")[1]
        try:
            yield self
        finally:
            self._transport.close()

    def datagram_received(self, query: bytes, sender: tuple[str, int]) -> None:
        assert self._transport is not None
        self._transport.sendto(self._answer(query), sender)

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 1
        labels, position = [], 12
        while query[position]:
            labels.append(query[position + 1 : position + 1 + query[position]])
            position += 1 + query[position]
        (kind,) = struct.unpack_from(">H", query, end)
        name = b".".join(labels).decode().lower()
        self._asked[name].set()
        known = self.names.get(name)
        addresses = known or () if kind == _A else ()
        flags = _RESPONSE if known else _NAME_ERROR
        records = (
            struct.pack(">HHHIH", _NAME_OF_THE_QUESTION, _A, _IN, _TTL_SECONDS, 4)
            + socket.inet_aton(address)
            for address in addresses
        )
        head = query[:2] + struct.pack(">HHHHH", flags, 1, len(addresses), 0, 0)
        return head + query[12 : end + 4] + b"".join(records)
