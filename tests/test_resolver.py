"""The addresses that a target resolves to."""

import pytest
from pydantic import ValidationError

from rest_facade.config import FacadeSettings
from tests.name_server import NameServer
from tokenizer_svc.config import ModelSettings
from trivium.wire.replicas.resolver import Address, Resolver


async def resolved(resolver: Resolver) -> frozenset[Address]:
    """All addresses, after each name has been looked up."""
    for name in resolver.names:
        await resolver.look_up(name)
    return resolver.addresses


async def targets(target: str) -> set[str]:
    return {address.target for address in await resolved(Resolver(target))}


@pytest.mark.parametrize(
    ("target", "addresses"),
    [
        ("10.0.0.7:50051", {"ipv4:10.0.0.7:50051"}),
        ("ipv4:10.0.0.7:1,10.0.0.8:2", {"ipv4:10.0.0.7:1", "ipv4:10.0.0.8:2"}),
        ("dns:///10.0.0.7:1, 10.0.0.7:1", {"ipv4:10.0.0.7:1"}),
        ("[2001:db8::1]:443", {"ipv6:[2001:db8::1]:443"}),
        ("unix:/run/tokenizer.sock", {"unix:/run/tokenizer.sock"}),
        ("xds:///tokenizer", {"xds:///tokenizer"}),
    ],
)
async def test_ip_addresses_are_not_resolved(target: str, addresses: set[str]) -> None:
    """These are one or several IP addresses, or schemes that only gRPC knows; they never change."""
    assert addresses == await targets(target)
    assert not Resolver(target).names


async def test_names_in_etc_hosts_are_resolved() -> None:
    """Names in /etc/hosts are resolved too."""
    assert "ipv4:127.0.0.1:7" in await targets("localhost:7")
    assert Resolver("localhost:7").names == Resolver("dns:///localhost:7").names


async def test_all_addresses_of_all_names() -> None:
    """A list's addresses are combined; each has the name by which the server is called."""
    with NameServer(a=["127.0.0.2", "127.0.0.3"], b=["127.0.0.4"]) as names:
        target = ",".join([names.target("a", 5), names.target("b", 6), "127.0.0.9:7"])
        addresses = await resolved(Resolver(target))

    assert {
        Address("ipv4:127.0.0.2:5", "a:5"),
        Address("ipv4:127.0.0.3:5", "a:5"),
        Address("ipv4:127.0.0.4:6", "b:6"),
        Address("ipv4:127.0.0.9:7"),
    } == addresses


async def test_a_dual_stack_server_is_one_replica() -> None:
    """IPv4 is used, on which services listen by default; IPv6 if there is no IPv4 address."""
    with NameServer(both=["2001:db8::2", "127.0.0.2"], new=["2001:db8::3"]) as names:
        assert {"ipv4:127.0.0.2:5"} == await targets(names.target("both", 5))
        assert {"ipv6:[2001:db8::3]:5"} == await targets(names.target("new", 5))


async def test_responses_over_512_bytes() -> None:
    """They exceed 512 bytes, the classic limit of a DNS response."""
    addresses = [f"127.0.1.{number}" for number in range(50)]
    with NameServer(many=addresses) as names:
        found = await targets(names.target("many", 5))

    assert {f"ipv4:{address}:5" for address in addresses} == found


async def test_failed_lookups_keep_the_last_addresses() -> None:
    """If the name server is gone or knows no address, the last addresses are kept."""
    with NameServer(a=["127.0.0.2"]) as names:
        resolver = Resolver(names.target("a", 5))
        first = await resolved(resolver)
        names.names["a"] = []
        nobody = await resolved(resolver)
        names.names["a"] = ["127.0.0.3"]
        other = await resolved(resolver)
    gone = await resolved(resolver)

    assert [{"ipv4:127.0.0.2:5"}, {"ipv4:127.0.0.3:5"}] == [
        {address.target for address in addresses} for addresses in (first, other)
    ]
    assert first == nobody
    assert other == gone


@pytest.mark.parametrize(
    "target", ["", "localhost", "localhost:", "localhost:0", "a:1,,b:2", "a:65536", "http://a:1"]
)
def test_invalid_targets_are_refused(target: str) -> None:
    """It is refused at startup; the error names the setting and the wrong part."""
    with pytest.raises(ValidationError, match=r"tokenizer_target\n.* should be host:port"):
        FacadeSettings(tokenizer_target=target)
    with pytest.raises(ValidationError, match=r"generator_target\n.* should be host:port"):
        ModelSettings(model_directory=".", generator_target=target)


@pytest.mark.parametrize("server", ["ns.example", "ns.example:53", "10.0.0.1:0", "10.0.0.1:65536"])
def test_a_name_server_needs_an_ip_address(server: str) -> None:
    """Its own name could not be resolved, so it is refused at startup."""
    with pytest.raises(ValidationError, match="should be the IP address of a name server"):
        FacadeSettings(tokenizer_target=f"dns://{server}/tokenizer:50051")


@pytest.mark.parametrize("server", ["10.0.0.1", "10.0.0.1:53", "2001:db8::1", "[2001:db8::1]:53"])
def test_a_name_server_may_have_a_port(server: str) -> None:
    """It may be IPv4 or IPv6."""
    assert server == Resolver(f"dns://{server}/tokenizer:50051").names[0].server
