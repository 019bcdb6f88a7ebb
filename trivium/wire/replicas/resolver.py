"""Resolves a target to its current addresses: names by DNS, IP addresses as they are.

host:port                  all addresses of the host; the same as dns:///host:port
dns://server:port/host:port    the same, resolved by the name server at that IP address
a:port,b:port              the addresses of all of them
unix:…, xds:///…           left to gRPC, as one address
"""

import ipaddress
import re
import socket
from collections import defaultdict
from dataclasses import dataclass

import aiodns

from trivium.wire.replicas.outage import Outage

_TIMEOUT_SECONDS = 1.0  # per DNS query; there is one retry
_DNS = re.compile(r"dns:(?://(?P<server>[^/]*)/)?(?P<host_port>[^/]+)")
_HOST_PORT = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})")
_OF_GRPC = re.compile(r"(?:unix|unix-abstract|vsock|xds|passthrough):.+")


class TargetError(ValueError):
    """A malformed target."""


@dataclass(frozen=True)
class Address:
    """The address of one replica in gRPC's syntax, such as ipv4:10.0.0.7:50051.

    `authority` is the name it was resolved from, for proxies that route by it.
    """

    target: str
    authority: str | None = None

    @property
    def name(self) -> str:
        """The name it was resolved from, which it may share with others, or else the address."""
        return self.authority or str(self)

    def __str__(self) -> str:
        return self.target.removeprefix("ipv4:").removeprefix("ipv6:")


@dataclass(frozen=True)
class Name:
    """A name to resolve by DNS."""

    host: str
    port: int
    server: str | None  # DNS server, host:port; None for the system's


class Resolver:
    """Resolves the `names` of a target; raises TargetError if it is malformed."""

    def __init__(self, target: str) -> None:
        self.names: list[Name] = []
        self._fixed: set[Address] = set()
        self._known: dict[Name, frozenset[Address]] = {}
        self._outages: defaultdict[Name, Outage] = defaultdict(Outage)
        for part in target.split(","):
            self._add(part.strip())

    @property
    def addresses(self) -> frozenset[Address]:
        """All addresses known now; those given as IP addresses are known from the start."""
        return frozenset(self._fixed.union(*self._known.values()))

    async def look_up(self, name: Name) -> None:
        """Refreshes the addresses of one of `names`.

        If the lookup fails or returns no address, the previous addresses stay: health checks decide
        whether they still serve.
        """
        try:
            self._known[name] = await _look_up(name)
            self._outages[name].ended()
        except aiodns.error.DNSError as error:
            _, reason = error.args
            self._outages[name].failed(f"{name.host}:{name.port} cannot be resolved", reason)

    def _add(self, part: str) -> None:
        if _OF_GRPC.fullmatch(part):
            self._fixed.add(Address(part))
            return
        server = None
        if dns := _DNS.fullmatch(part):
            server, part = dns["server"] or None, dns["host_port"]
            if server is not None and not _is_server(server):
                raise TargetError(f"{server!r} should be the IP address of a name server")
        match = _HOST_PORT.fullmatch(re.sub(r"^ipv[46]:", "", part))
        if match is None or not 0 < int(match["port"]) < 65536:
            raise TargetError(f"{part!r} should be host:port")
        host, port = match["v6"] or match["host"], int(match["port"])
        try:
            self._fixed.add(Address(_ip_target(host, port)))
        except ValueError:
            self.names.append(Name(host, port, server))


def _is_server(text: str) -> bool:
    """Whether this is an IP address, with or without a port."""
    match = _HOST_PORT.fullmatch(text)
    ip, port = (text, "53") if match is None else (match["v6"] or match["host"], match["port"])
    try:
        ipaddress.ip_address(ip.strip("[]"))
    except ValueError:
        return False
    return 0 < int(port) < 65536


def check_target(target: str) -> str:
    """The target itself; raises TargetError if it is malformed."""
    Resolver(target)
    return target


def _ip_target(ip: str, port: int) -> str:
    """The address in gRPC's syntax. Raises ValueError if `ip` is a name."""
    if ipaddress.ip_address(ip.partition("%")[0]).version == 6:
        return f"ipv6:[{ip}]:{port}"
    return f"ipv4:{ip}:{port}"


async def _look_up(name: Name) -> frozenset[Address]:
    """The IPv4 addresses of a name, or its IPv6 addresses if it has no others: a server with both
    is one replica, which may listen on only one of them.

    Raises DNSError. Each lookup has its own resolver, because a resolver caches answers for their
    time to live and never rereads resolv.conf."""
    servers = None if name.server is None else [name.server]
    async with aiodns.DNSResolver(servers, timeout=_TIMEOUT_SECONDS, tries=2) as resolver:
        answer = await resolver.getaddrinfo(
            name.host, family=socket.AF_UNSPEC, port=name.port, type=socket.SOCK_STREAM
        )
    families = {node.family for node in answer.nodes}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    ips = {node.addr[0].decode() for node in answer.nodes if node.family == family}
    return frozenset(Address(_ip_target(ip, name.port), f"{name.host}:{name.port}") for ip in ips)
