"""Whether others can connect to a peer: what it makes of their knocks, and real ones, also through a home's router."""

import ctypes
import multiprocessing
import socket
from types import SimpleNamespace

import pytest
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments
from benchmarks import emulated_links
from benchmarks.emulated_links import Link, Network
from src.access.membership import Identity
from src.access.ownership import peer_id_of
from src.swarm import join
from src.swarm.dht import addresses_for_others, find_reach, start_dht, visible_addresses
from src.swarm.join import settle_reach
from src.swarm.probe import Knock
from src.swarm.reach import LOOPBACK, PRIVATE, PUBLIC, Reach, describe, describe_first, nearness

WORLD, HOME = "45.77.1.2", "192.168.1.2"
LISTENING = [f"/ip4/127.0.0.1/tcp/31337/p2p/Qm{'x' * 5}", f"/ip4/{HOME}/tcp/31337/p2p/Qm{'x' * 5}"]
HIT, MISS = Knock(WORLD, 31337, True, True), Knock(WORLD, 31337, False, error="timeout")
AT_HOME = Knock(HOME, 31337, True, True)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/45.77.1.2/tcp/1", PUBLIC),
        ("/dns4/peer.example/tcp/1", PUBLIC),
        ("/ip6/2a00:1450::1/tcp/1", PUBLIC),
        ("/ip4/192.168.1.2/tcp/1", PRIVATE),
        ("/ip4/10.0.0.1/tcp/1", PRIVATE),
        ("/ip4/100.64.0.1/tcp/1", PRIVATE),
        ("/ip4/127.0.0.1/tcp/1", LOOPBACK),
        ("/ip6/::1/tcp/1", LOOPBACK),
    ],
)
def test_nearness_of_an_address(address, expected):
    assert nearness(address) == expected


@pytest.mark.parametrize(
    ("found", "is_client", "announced", "words"),
    [
        ([[HIT]], False, [f"/ip4/{WORLD}/tcp/31337", f"/ip4/{HOME}/tcp/31337"],
         f"others can connect to this peer: {WORLD} TCP port 31337"),
        ([[AT_HOME]], False, [], "in its own network"),
        ([[MISS]], True, [], f"at {WORLD} TCP port 31337: goes on as a client, others average for it"),
        ([[AT_HOME], [MISS]], True, [], "goes on as a client"),
        ([[MISS, HIT]], False, [f"/ip4/{WORLD}/tcp/31337", f"/ip4/{HOME}/tcp/31337"], "others can connect"),
        ([[Knock(WORLD, 31337, True, False)]], True, [], "goes on as a client"),
        ([], False, [], "no initial peer could test"),
    ],
    ids=["reached", "by a neighbour", "missed", "by a neighbour only", "one port of two", "another program", "no word"],
)  # fmt: skip
def test_peer_goes_on_as_what_its_initial_peers_have_found(monkeypatch, found, is_client, announced, words):
    monkeypatch.setattr(join, "find_reach", lambda peer, identity: Reach(found, LISTENING))
    peer, said = PeerArguments(run_id="r", initial_peers=[f"/ip4/{WORLD}/tcp/1/p2p/Qm"]), []
    join.settle_reach(peer, None, may_be_client=True, say=said.append)
    assert peer.is_client == is_client and peer.client_mode in (True, False)
    assert len(said) == 1 and words in said[0]
    if not is_client:
        assert peer.announce_maddrs == announced, "what the peer does not know by itself"
        assert peer.host_maddrs == ["/ip4/0.0.0.0/tcp/31337"], "the port that was tested"


def test_peer_that_names_its_address_announces_no_other(monkeypatch):
    monkeypatch.setattr(join, "find_reach", lambda peer, identity: Reach([[HIT]], LISTENING))
    named = ["/dns4/peer.example/tcp/31337"]
    peer = PeerArguments(run_id="r", initial_peers=[f"/ip4/{WORLD}/tcp/1/p2p/Qm"], announce_maddrs=list(named))
    join.settle_reach(peer, None, may_be_client=True, say=print)
    assert peer.announce_maddrs == named


def test_auxiliary_peer_is_told_and_never_a_client(monkeypatch):
    monkeypatch.setattr(join, "find_reach", lambda peer, identity: Reach([[MISS]], LISTENING))
    peer, said = PeerArguments(run_id="r", initial_peers=[f"/ip4/{WORLD}/tcp/1/p2p/Qm"]), []
    join.settle_reach(peer, None, may_be_client=False, say=said.append)
    assert not peer.is_client and "others cannot connect" in said[0] and "client" not in said[0]


def test_peer_whose_initial_peers_are_on_its_machine_asks_nobody(monkeypatch):
    monkeypatch.setattr(join, "find_reach", lambda *_: 1 / 0)
    peer, said = PeerArguments(run_id="r", initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/Qm"]), []
    join.settle_reach(peer, None, may_be_client=True, say=said.append)
    assert not peer.is_client and "on this machine" in said[0]


@pytest.mark.parametrize(
    ("listening", "told", "where"),
    [
        ([WORLD, HOME, "127.0.0.1"], [WORLD], ""),
        ([HOME, "10.0.0.1", "127.0.0.1"], [HOME, "10.0.0.1"], "in its own network"),
        (["127.0.0.1"], ["127.0.0.1"], "on its own machine"),
    ],
)
def test_others_are_told_the_addresses_that_reach_furthest(listening, told, where):
    dht = SimpleNamespace(get_visible_maddrs=lambda latest: [f"/ip4/{host}/tcp/1" for host in reversed(listening)])
    addresses = addresses_for_others(dht, PeerArguments(run_id="r"))
    assert sorted(addresses) == sorted(f"/ip4/{host}/tcp/1" for host in told)
    assert where in describe_first(addresses) and ("--announce_maddrs" in describe_first(addresses)) == bool(where)


def test_client_that_begins_a_run_is_told_that_it_is_alone():
    assert describe_first([]).endswith("it trains alone")


def test_others_are_told_where_a_client_has_joined():
    peer = PeerArguments(run_id="r", client_mode=True, initial_peers=[f"/ip4/{WORLD}/tcp/1/p2p/Qm"])
    assert addresses_for_others(None, peer) == peer.initial_peers


@pytest.mark.swarm
def test_peer_is_knocked_at_before_it_joins(shut_down_at_end):
    """Its node is gone afterwards, and the port free."""
    member, _ = start_dht(PeerArguments(run_id="r", host_maddrs=["/ip4/127.0.0.1/tcp/0"]), Identity(RSAPrivateKey()))
    shut_down_at_end(member)
    (address,) = map(str, member.get_visible_maddrs())
    peer = PeerArguments(run_id="r", host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=[address])
    identity = Identity(RSAPrivateKey())
    reach = find_reach(peer, identity)
    (one,) = reach.reached
    assert not reach.missed and one.host == "127.0.0.1" and f"/tcp/{one.port}/" in reach.listening[0]
    assert describe(reach, may_be_client=True).startswith("others can connect to this peer on its own machine")
    peer.host_maddrs = reach.with_ports(peer.host_maddrs)
    joined, _ = start_dht(peer, identity)
    shut_down_at_end(joined)
    assert [str(own) for own in joined.get_visible_maddrs()] == list(reach.listening)


@pytest.mark.fails_to_start
def test_peer_that_cannot_be_knocked_at_says_why():
    nobody = f"/ip4/127.0.0.1/tcp/9/p2p/{peer_id_of(RSAPrivateKey().get_public_key().to_bytes())}"
    peer, identity = PeerArguments(run_id="r", initial_peers=[nobody]), Identity(RSAPrivateKey())
    with socket.create_server(("127.0.0.1", 0)) as other_program:
        peer.host_maddrs = [f"/ip4/127.0.0.1/tcp/{other_program.getsockname()[1]}"]
        with pytest.raises(ValueError, match=r"^--host_maddrs: .* is taken by another program"):
            find_reach(peer, identity)
    peer.host_maddrs = ["/ip4/127.0.0.1/tcp/0"]
    with pytest.raises(ValueError, match=r"^--initial_peers: cannot reach"):
        find_reach(peer, identity)


def enter(host, initial_peers: list[str], pipe) -> None:
    """In a process of its own: move to a host's network, and start a node there; ends when the other side says so."""
    with open(f"/var/run/netns/{host.namespace}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    peer, identity, said = PeerArguments(run_id="r", initial_peers=initial_peers), Identity(RSAPrivateKey()), []
    if initial_peers:
        settle_reach(peer, identity, may_be_client=True, say=said.append)
    dht, _ = start_dht(peer, identity)
    pipe.send((said, visible_addresses(dht)))
    pipe.recv()
    dht.shutdown()


@pytest.mark.swarm
def test_peer_behind_a_router_is_a_client_and_its_neighbour_in_the_street_is_none():
    reason = emulated_links.what_lacks()
    if reason:
        pytest.skip(f"links cannot be emulated: {reason}")
    forking, peers, initial = multiprocessing.get_context("fork"), [], []
    found = {}
    with Network("45.77") as network:
        try:
            for name in ("member", "open", "home"):
                host = network.add(name, Link(1000, 1000, nat=name == "home"))
                pipe, other_end = forking.Pipe()
                process = forking.Process(target=enter, args=(host, initial, other_end))
                process.start()
                peers.append((process, pipe))
                assert pipe.poll(120), f"nothing from {name}"
                found[name] = pipe.recv()
                initial = initial or found[name][1][:1]
        finally:
            for process, pipe in peers:
                pipe.send("end")
                process.join(30)
    assert nearness(initial[0]) == PUBLIC
    (said,), addresses = found["open"]
    assert said.startswith("others can connect to this peer: 45.77.2.2 TCP port") and "45.77.2.2" in addresses[0]
    (said,), addresses = found["home"]
    assert "goes on as a client" in said and addresses == [], "it tells nobody an address"
