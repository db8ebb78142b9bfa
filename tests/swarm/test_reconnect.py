"""A peer that restarts with its old command, which names no other, is found again by those who know its address."""

import threading
import time

import hivemind
import pytest
from hivemind.p2p import P2P
from hivemind.utils import get_dht_time

from src.process.local_swarm import free_port
from src.swarm.reconnect import KeepInTouch


def start_dht(identity, port: int = 0, initial_peers=()) -> hivemind.DHT:
    return hivemind.DHT(
        start=True,
        initial_peers=list(initial_peers),
        host_maddrs=[f"/ip4/127.0.0.1/tcp/{port}"],
        identity_path=str(identity),
    )


def read(dht: hivemind.DHT, key: str):
    record = dht.get(key, latest=True)
    return None if record is None else record.value


@pytest.fixture
def member_and_restart(tmp_path, shut_down_at_end):
    """A member that joined a first peer, the address it was given, and a function that restarts the first peer."""
    first, second = tmp_path / "first.pem", tmp_path / "second.pem"
    for identity in (first, second):
        P2P.generate_identity(str(identity))
    port = free_port()
    old = start_dht(first, port)
    (address,) = (str(address) for address in old.get_visible_maddrs())
    member = shut_down_at_end(start_dht(second, initial_peers=[address]))

    def restart() -> hivemind.DHT:
        old.shutdown()
        for _ in range(2):
            member.store("epoch", 16, get_dht_time() + 300)  # in vain, and hivemind forgets the peer
        return shut_down_at_end(start_dht(first, port))

    return member, address, restart


def test_peer_that_restarts_alone_is_found_by_those_who_joined_it(member_and_restart):
    member, address, restart = member_and_restart
    restarted = restart()
    assert [str(maddr) for maddr in restarted.get_visible_maddrs()] == [address]
    assert member.store("epoch", 17, get_dht_time() + 300)
    time.sleep(3.0)
    assert read(restarted, "epoch") is None, "hivemind has learnt to do it: the module can go"
    stop = threading.Event()
    keeper = KeepInTouch(member, ["/ip4/127.0.0.1/tcp/9/p2p/" + address.rpartition("/")[2][:-4] + "aaaa", address],
                         stop=stop, period=0.2)  # fmt: skip
    keeper.start()
    give_up_at = time.monotonic() + 30
    while read(restarted, "epoch") != 17:
        assert time.monotonic() < give_up_at
        time.sleep(0.2)
    stop.set()
    keeper.join(30)
    assert not keeper.is_alive()


def test_nobody_is_greeted_by_a_peer_that_was_given_no_address(member_and_restart):
    member, _, _ = member_and_restart
    keeper = KeepInTouch(member, [], stop=threading.Event(), period=0.1)
    keeper.start()
    keeper.join(5)
    assert not keeper.is_alive()


def test_dht_that_is_shut_down_ends_nothing_with_a_traceback():
    class Closed:
        def run_coroutine(self, *args, **kwargs):
            calls.append(args)
            raise OSError("handle is closed")

    calls, stop = [], threading.Event()
    keeper = KeepInTouch(Closed(), ["/ip4/127.0.0.1/tcp/9/p2p/x"], stop=stop, period=0.01)
    keeper.start()
    give_up_at = time.monotonic() + 10
    while len(calls) < 2 and time.monotonic() < give_up_at:
        time.sleep(0.01)
    stop.set()
    keeper.join(10)
    assert len(calls) >= 2, "the first error ended the thread"
