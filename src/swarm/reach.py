"""Can others connect to this peer? It finds out before it becomes part of a run, from peers that knock at its ports.

Whoever stands behind a router can call, but not be called, and hivemind 1.1.12 does not notice: a peer that has called
is answered over the same connection. Two such peers never meet, and the rounds of both fail, again and again.

Only the initial peers are asked, which a person has chosen: anybody could say that nobody can be reached.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from hivemind.dht import DHTNode

from src.swarm.probe import MAX_PORTS, Knock, address_of, request_knocks

logger = logging.getLogger(__name__)

PUBLIC, PRIVATE, LOOPBACK = range(3)


@dataclass(frozen=True)
class Reach:
    """What each initial peer that could be asked has found at this peer's ports: one or more knocks each.

    ``listening``: the addresses at which this peer listened then.
    """

    found: Sequence[Sequence[Knock]] = ()
    listening: Sequence[str] = ()

    @property
    def reached(self) -> list[Knock]:
        return [one for knocks in self.found for one in knocks if one.is_peer]

    @property
    def missed(self) -> list[Knock]:
        """What those have tried who could not connect at all."""
        return [one for knocks in self.found if not any(one.is_peer for one in knocks) for one in knocks]

    def with_ports(self, host_maddrs: Sequence[str]) -> list[str]:
        """Where to listen again, at the same ports."""
        ways = [address.strip("/").split("/") for address in self.listening]
        ports = {kind: {way[3] for way in ways if (way[0], way[2]) == (kind, "tcp")} for kind in ("ip4", "ip6")}
        return [
            address.removesuffix("0") + next(iter(own))
            if address.endswith("/tcp/0") and len(own := ports.get(address.strip("/").partition("/")[0], ())) == 1
            else address
            for address in host_maddrs
        ]

    def announced(self) -> list[str]:
        """What others must be told because this peer does not know it by itself: addresses that a router translates to
        its own; with those of its network, for its neighbours there. Empty if it knows all."""
        own = {address_of(address) for address in self.listening}
        known = {host for host, _ in own}
        foreign = [way_to(one) for one in self.reached if one.host not in known]
        ways = (address.rpartition("/p2p/")[0] for address in self.listening if nearness(address) < LOOPBACK)
        return list(dict.fromkeys([*foreign, *ways])) if foreign else []


def nearness(address: str) -> int:
    """From where an address can be used: PUBLIC, everywhere; PRIVATE, in its network only; LOOPBACK, on its machine."""
    try:
        host = ipaddress.ip_address(address.split("/")[2])
    except (ValueError, IndexError):  # a name; or no address at all, which whoever connects to it says
        return PUBLIC
    return LOOPBACK if host.is_loopback else PUBLIC if host.is_global else PRIVATE


def way_to(tried: Knock) -> str:
    return f"/{'ip6' if ':' in tried.host else 'ip4'}/{tried.host}/tcp/{tried.port}"


async def ask_all(node: DHTNode, peer_ids: Sequence[str], announced: Sequence[str]) -> Reach:
    """Let these peers knock where this one listens, or says that it does; all at once."""
    listening = [str(address) for address in await node.get_visible_maddrs(latest=True)]
    ports = sorted({address_of(address)[1] for address in (*announced, *listening)} - {None, 0})[:MAX_PORTS]
    answers = await asyncio.gather(*(request_knocks(node, peer_id, ports) for peer_id in peer_ids))
    return Reach([knocks for knocks in answers if knocks], listening)


def places(knocks: Sequence[Knock]) -> str:
    return ", ".join(dict.fromkeys(f"{one.host} TCP port {one.port}" for one in knocks))


def describe(reach: Reach, *, may_be_client: bool) -> str:
    """One line on what was found, and on what this peer does about it."""
    if reach.missed:
        goes_on = "goes on as a client, others average for it" if may_be_client else "others have no use of it"
        return (
            f"others cannot connect to this peer at {places(reach.missed)}: {goes_on}; to change that, open the port "
            "of --host_maddrs in the firewall and forward it in the router"
        )
    if reach.reached:
        nearest = min(nearness(way_to(one)) for one in reach.reached)
        where = {PUBLIC: "", PRIVATE: " in its own network", LOOPBACK: " on its own machine"}[nearest]
        return f"others can connect to this peer{where}: {places(reach.reached)}"
    return (
        "no initial peer could test whether others can connect to this one: goes on as if they can; behind a router or "
        "firewall, start it with --client_mode"
    )


def describe_first(addresses: Sequence[str]) -> str:
    """The same for who begins a run, where nobody is there to knock. ``addresses``: what it tells others."""
    if not addresses:
        return "nobody can connect to this peer (--client_mode), and it connects to nobody: it trains alone"
    within = {PUBLIC: "", PRIVATE: ", in its own network", LOOPBACK: ", on its own machine"}[nearness(addresses[0])]
    return f"nobody is there yet to test whether others can connect to this peer: goes on as if they can{within}" + (
        " (elsewhere: forward a port to it and name the public address in --announce_maddrs)" if within else ""
    )
