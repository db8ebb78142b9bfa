"""Ports, initial peers, clocks, bandwidth, and the settings of the run: whatever takes two to be tested."""

import asyncio
import copy
import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

import hivemind

from arguments import PeerArguments, TrainerPeerArguments
from src.access.membership import load_identity
from src.preflight.check import FAILED, OK, WARNING, Check, attempt
from src.swarm.dht import fetch_progress, start_dht, visible_addresses
from src.swarm.probe import Knock, Speed, address_of, ask_to_knock, knock, measure_speed, ping
from src.swarm.run_card import RunCard

MAX_CLOCK_OFFSET = 3.0  # hivemind's own limit


@dataclass(frozen=True)
class Seen:
    """What was seen of the run: the bandwidth to an initial peer, Mbit/s; trainers, their samples a second together,
    and the epoch that at least half of them have reached."""

    bandwidth: float | None = None
    num_trainers: int = 0
    samples_per_second: float = 0.0
    epoch: int = 0


def look_at_trainers(dht, run_id: str, *, fastest: float) -> Seen:
    """``fastest``: samples a second that are believed of a trainer, who may claim anything."""
    records = list(fetch_progress(dht, run_id).values())
    return Seen(
        num_trainers=len(records),
        samples_per_second=sum(min(record.samples_per_second, fastest) for record in records),
        epoch=median_low(record.epoch for record in records) if records else 0,
    )


def check_own_port(address: str) -> Check:
    """Whether this peer can listen where it is told to."""
    host, port = address_of(address)
    name = f"own address {address}"
    if port is None:
        return Check(name, OK, "not a TCP address, so not tested")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fixes = {
                "Address already in use": f"another program of this machine (an earlier trainer?) listens on TCP port "
                f"{port}: end it (`ss -tlnp 'sport = :{port}'` names it), or choose another port in --host_maddrs",
                "Cannot assign requested address": f"this machine has no address {host}: listen on 0.0.0.0 and give "
                "the address that others see as --announce_maddrs",
            }
            fix = fixes.get(error.strerror, "choose another address in --host_maddrs")
            return Check(name, FAILED, f"cannot listen: {error.strerror}", fix)
    return Check(name, OK, "any free port" if port == 0 else f"TCP port {port} of this machine is free")


def is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def explain_knock(name: str, tried: Knock) -> Check:
    """Whose side is wrong when an initial peer cannot be reached over TCP, and what that side has to do."""
    where = f"{tried.host} TCP port {tried.port}"
    near = " (a private address: it works in that peer's own network only)" if is_private(tried.host) else ""
    if tried.is_peer:
        return Check(name, OK, f"{where} answers after {1000 * tried.seconds:.0f} ms")
    if tried.open:
        return Check(name, FAILED, f"{where} is open, but what answers there is no hivemind peer",
                     "the other side: another program has that port; take the address the peer prints")  # fmt: skip
    reasons = {
        "refused": (
            f"{where} refuses: the machine answers, but nothing listens on that port",
            "the other side: the peer has ended, or was started anew with another port (give it a fixed one in "
            "--host_maddrs and an --identity_path); if it runs, its router must forward this port",
        ),
        "timeout": (
            f"{where} does not answer within some seconds{near}",
            "the other side: the machine is off, or a firewall there drops the port (open it for TCP); this side: a "
            "firewall that lets no connection out (try another network)",
        ),
        "unknown host": (f"no address is known for the name {tried.host}", "correct the name, or use the IP address"),
    }
    found, fix = reasons.get(
        tried.error, (f"{where}: {tried.error}{near}", "this side: check the network and its route to that address")
    )
    return Check(name, FAILED, found, fix)


def split_address(address: str) -> tuple[str, str]:
    """The way to a peer, and its id."""
    way, _, peer_id = address.rpartition("/p2p/")
    return way, peer_id


def check_initial_peer(address: str) -> Check:
    host, port = address_of(split_address(address)[0])
    name = f"initial peer {address}"
    if port is None:
        return Check(name, OK, "not a TCP address: tested by joining only")
    return explain_knock(name, asyncio.run(knock(host, port)))


def check_contact(address: str, dht) -> list[Check]:
    """Whether the peer with this id answers, how fast, and whether its clock agrees with ours."""
    way, peer_id = split_address(address)
    answer, name = ping(dht, peer_id) if peer_id else None, f"round trip to {address}"
    if answer is None:
        return [
            Check(name, FAILED, f"a peer listens at {way}, but it is not {peer_id}, or does not let this peer in",
                  "the other side: its id changes at each start without --identity_path; take the newest line that it "
                  "prints; with --authorize, check that this peer is admitted")
        ]  # fmt: skip
    checks = [Check(name, OK, f"{1000 * answer.seconds:.0f} ms")]
    offset = answer.clock_offset
    if abs(offset) > MAX_CLOCK_OFFSET:
        direction = "behind" if offset > 0 else "ahead of"
        checks.append(Check("clock", FAILED, f"this machine's is {abs(offset):.0f} s {direction} that of {way}",
                            "set it: `timedatectl set-ntp true`; if it is right, the other side must"))  # fmt: skip
    else:
        checks.append(Check("clock", OK, f"within {max(0.1, abs(offset)):.1f} s of that of {way}"))
    return checks


def check_reachability(dht, address: str, *, announced: Sequence[str]) -> Check:
    """Let an initial peer try this peer's port from outside."""
    name, (way, peer_id) = "own port from outside", split_address(address)
    visible = visible_addresses(dht)
    listening = {address_of(split_address(one)[0])[1] for one in visible}
    ports = sorted((listening | {address_of(one)[1] for one in announced}) - {None, 0})
    tried = ask_to_knock(dht, peer_id, ports) or []
    if not tried:
        return Check(name, WARNING, f"{way} could not test it", "only other peers can tell whether your port is open")
    opened = [one for one in tried if one.is_peer]
    if opened:
        return Check(name, OK, f"{way} reaches {opened[0].host} TCP port {opened[0].port}")
    ways = ", ".join(f"{one.host} TCP port {one.port} ({one.error or 'another program answers'})" for one in tried)
    missing = missing_protocol(tried, [*visible, *announced])
    if missing:
        return Check(name, FAILED, f"{way} cannot reach this machine at {ways}", f"this side: {missing}")
    return Check(name, FAILED, f"{way} cannot reach this machine at {ways}",
                 "this side: open the port in the firewall and forward it in the router (--host_maddrs with a fixed "
                 "port, --announce_maddrs with the public address), or run a trainer with --client_mode")  # fmt: skip


def is_trainer(peer: PeerArguments) -> bool:
    return isinstance(peer, TrainerPeerArguments)


def or_client(found: Check) -> Check:
    """What `check_reachability` has found, for who may go on as a client."""
    if found.state != FAILED:
        return found
    return Check(found.name, WARNING, f"{found.found}; this trainer goes on as a client, others average for it",
                 found.fix.replace(", or run a trainer with --client_mode", ""))  # fmt: skip


def missing_protocol(tried: Sequence[Knock], own: Sequence[str]) -> str:
    """What to do where this peer was called under an address of the kind, IPv4 or IPv6, that it does not listen on."""
    called = {"ip6" if ":" in one.host else "ip4" for one in tried}
    listens = {address.strip("/").partition("/")[0] for address in own}
    if len(called) != 1 or not listens <= {"ip4", "ip6"} or called & listens:
        return ""
    (kind,) = called
    name, everywhere = ("IPv6", "::") if kind == "ip6" else ("IPv4", "0.0.0.0")
    return (
        f"it is reached over {name}, but listens on the other kind of addresses only: add "
        f"/{kind}/{everywhere}/tcp/PORT to --host_maddrs"
    )


def describe_speed(speed: Speed | None, way: str, given) -> Check:
    if speed is None:
        return Check("bandwidth", WARNING, f"{way} did not take part in a measurement",
                     "pass the lower of your download and upload speed in Mbit/s as --bandwidth")  # fmt: skip
    found = f"{speed.download:.0f} Mbit/s from {way}, {speed.upload:.0f} Mbit/s to it"
    if isinstance(given, float) and given > 2 * speed.bandwidth:
        return Check("bandwidth", WARNING, f"{found}, but --bandwidth is {given:.0f}",
                     "others would wait for this peer: give what was measured, or `auto`")  # fmt: skip
    return Check("bandwidth", OK, found + ("" if given else f"; use --bandwidth {speed.bandwidth:.0f}, or auto"))


def without_new_key(peer: PeerArguments) -> PeerArguments:
    """The peer as it tests: a key that does not exist yet is not made for that."""
    peer = copy.copy(peer)
    peer.restart = False
    if peer.token_file is None and peer.identity_path and not Path(peer.identity_path).expanduser().exists():
        peer.identity_path = None
    return peer


def join(peer: PeerArguments) -> tuple[hivemind.DHT, bytes]:
    peer = without_new_key(peer)
    return start_dht(peer, load_identity(peer))


def check_run_card(dht, peer: PeerArguments, owner: bytes, card: dict[str, str]) -> Check:
    """Whether the run would take this peer: all settings that peers must have in common."""
    found = RunCard(dht, peer.run_id, owner, card, initial_peers=peer.initial_peers).differences()
    if found:
        return Check("settings of the run", FAILED, "; ".join(found), "take the flags and files of the other peers")
    return Check("settings of the run", OK, "as those of the other peers")


def check_network(
    peer: PeerArguments,
    say: Callable[[Check], None],
    card: dict[str, str] | None = None,
    *,
    fastest: float = 0.0,
) -> Seen:
    """Ports first, one by one, so that the answer names the one that is wrong; then join as the run would.

    ``fastest``: see `look_at_trainers`.
    """
    listening = [] if peer.is_client else [check_own_port(address) for address in peer.host_maddrs]
    knocks = [check_initial_peer(address) for address in peer.initial_peers]
    reached = [address for address, check in zip(peer.initial_peers, knocks, strict=True) if check.state == OK]
    for check in listening:
        say(check)
    for check in knocks:  # one of several that is away does not matter
        say(Check(check.name, WARNING, check.found, check.fix) if reached and check.state == FAILED else check)
    if any(check.state == FAILED for check in listening) or (peer.initial_peers and not reached):
        return Seen()
    joining, started = attempt("peer-to-peer daemon", lambda: join(peer), lambda _: "it starts")
    if started is None:
        if reached and "cannot reach" in joining.found:  # TCP answers, libp2p does not: it is the id
            for address in reached:
                say(check_wrong_id(address))
        else:
            say(joining)
        return Seen()
    dht, owner = started
    try:
        say(joining)
        contacts = [(address, check_contact(address, dht)) for address in reached]
        met = [address for address, checks in contacts if checks[0].state == OK]
        for _, checks in contacts:
            for check in checks:
                say(check)
        if not met:
            if not peer.initial_peers:
                say(Check("bandwidth, clock", OK, "no initial peer to compare with: this peer begins a run"))
            return Seen()
        if not peer.is_client:
            found = check_reachability(dht, met[0], announced=peer.announce_maddrs)
            say(found if peer.client_mode is False or not is_trainer(peer) else or_client(found))
        speed = measure_speed(dht, split_address(met[0])[1])
        say(describe_speed(speed, split_address(met[0])[0], peer.bandwidth))
        if card is not None:
            say(check_run_card(dht, peer, owner, card))
        seen = look_at_trainers(dht, peer.run_id, fastest=fastest)
        return replace(seen, bandwidth=None if speed is None else speed.bandwidth)
    finally:
        dht.shutdown()


def check_wrong_id(address: str) -> Check:
    way, peer_id = split_address(address)
    return Check(f"joining through {address}", FAILED, f"a peer listens at {way}, but it does not answer as {peer_id}",
                 "the other side: its id changes at each start without --identity_path; take the newest line that it "
                 "prints")  # fmt: skip
