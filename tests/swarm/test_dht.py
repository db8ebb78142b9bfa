"""Joining a swarm fails with a line that names the flag; metrics travel between peers, and only true ones do."""

import asyncio
import math
import multiprocessing
import socket
import time
from types import SimpleNamespace

import hivemind
import pydantic.v1 as pydantic
import pytest
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2PDaemonError
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments
from src.access.membership import Identity
from src.process import watchdog
from src.swarm import dht as dht_module
from src.swarm.dht import (
    TrainerMetrics,
    fetch_checkpoint_epochs,
    fetch_metrics,
    fetch_progress,
    short_peer_name,
    start_dht,
    store_checkpoint_epoch,
    store_metrics,
    visible_addresses,
)

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SOME_PEER_ID = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
RUN = "metrics"


def peer_arguments(**kwargs) -> PeerArguments:
    return PeerArguments(**{"run_id": RUN, "host_maddrs": [LOOPBACK], **kwargs})


@pytest.mark.parametrize(
    ("flag", "address"),
    [
        ("initial_peers", "127.0.0.1:31337"),
        ("initial_peers", "/ip4/300.0.0.1/tcp/31337"),
        ("host_maddrs", "/ip4/127.0.0.1/tcp/notaport"),
        ("announce_maddrs", "example.org"),
    ],
)
def test_start_dht_names_the_flag_of_a_bad_multiaddress(flag, address):
    with pytest.raises(ValueError, match=rf"^--{flag}: '{address}' is not a multiaddress; one looks like /ip4/"):
        start_dht(peer_arguments(**{flag: [address]}))


def test_start_dht_wants_the_peer_id_in_an_address():
    with pytest.raises(ValueError, match=r"^--initial_peers: '/ip4/127.0.0.1/tcp/31337' lacks the peer's id"):
        start_dht(peer_arguments(initial_peers=["/ip4/127.0.0.1/tcp/31337"]))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.fails_to_start
def test_start_dht_says_which_peer_it_cannot_reach():
    address = f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{SOME_PEER_ID}"
    with pytest.raises(ValueError, match=rf"^--initial_peers: cannot reach {address}; check that") as caught:
        start_dht(peer_arguments(initial_peers=[address]))
    assert "\n" not in str(caught.value)


def test_start_dht_says_that_a_port_is_taken():
    with socket.socket() as other_program:
        other_program.bind(("127.0.0.1", 0))
        other_program.listen()
        address = f"/ip4/127.0.0.1/tcp/{other_program.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"^--host_maddrs: {address} is taken by another program") as caught:
            start_dht(peer_arguments(host_maddrs=[address]))
        assert "\n" not in str(caught.value)


def test_start_dht_turns_any_other_trouble_of_the_daemon_into_one_line(monkeypatch):
    def fail(**kwargs):
        raise P2PDaemonError("Daemon failed to start:\nfirst line\nlast line\n")

    monkeypatch.setattr(dht_module, "WatchedDHT", fail)
    with pytest.raises(ValueError, match=r"^cannot start the peer-to-peer daemon: last line$"):
        start_dht(peer_arguments())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValidationError("local time must be within 3 seconds  of others(local: 1795620005.58, peer: 1795620065.6)"),
         "this machine's clock is 60 s behind that of /ip4/203.0.113.5"),
        (ValidationError("Peer x can't access this node. Probably, libp2p has failed to bypass the firewall"),
         "cannot connect back to this peer; open the port of --host_maddrs"),
        (RuntimeError("DHTNode bootstrap failed: none of the initial_peers responded to a ping."), "does not answer"),
    ],
)  # fmt: skip
def test_start_dht_explains_why_a_peer_that_is_there_does_not_let_it_in(monkeypatch, error, words):
    def fail(**kwargs):
        raise error

    monkeypatch.setattr(dht_module, "WatchedDHT", fail)
    with pytest.raises(ValueError, match=words):
        start_dht(peer_arguments(initial_peers=[f"/ip4/203.0.113.5/tcp/1/p2p/{SOME_PEER_ID}"]))


def test_start_dht_keeps_its_address_in_the_identity_file(tmp_path, shut_down_at_end):
    arguments = peer_arguments(identity_path=str(tmp_path / "new folder" / "identity.key"))
    first, _ = start_dht(arguments)
    peer_id = first.peer_id
    first.shutdown()
    again, _ = start_dht(arguments)
    shut_down_at_end(again)
    assert again.peer_id == peer_id


@pytest.fixture(scope="module")
def swarm():
    """Two peers of one run with their public keys, and a stranger's node, which checks nothing."""
    nodes = []
    try:
        for _ in range(2):
            RSAPrivateKey._process_wide_key = None  # peers of one process would share their key
            initial_peers = visible_addresses(nodes[0][0]) if nodes else []
            nodes.append(start_dht(peer_arguments(initial_peers=initial_peers)))
        stranger = hivemind.DHT(start=True, initial_peers=visible_addresses(nodes[0][0]), host_maddrs=[LOOPBACK])
        nodes.append((stranger, b"[owner:stranger]"))
        yield nodes
    finally:
        for dht, _ in reversed(nodes):
            dht.shutdown()


def wait_for_metrics(dht, condition, *, timeout: float = 30.0) -> dict[bytes, TrainerMetrics]:
    give_up_at = time.monotonic() + timeout
    while not condition(metrics := fetch_metrics(dht, RUN)):
        assert time.monotonic() < give_up_at, metrics
        time.sleep(0.05)
    return metrics


def test_metrics_reach_other_peers(swarm):
    (first, first_key), (second, second_key), _ = swarm
    reports = {
        first_key: TrainerMetrics(epoch=3, samples=64, samples_per_second=12.5, loss=20.0, mini_steps=4),
        second_key: TrainerMetrics(epoch=3, samples=32, loss=10.0, mlm_loss=9.0, sop_loss=1.0, failed_rounds=1),
    }
    for dht, key in ((first, first_key), (second, second_key)):
        store_metrics(dht, RUN, key, reports[key], expiration=60)
    for dht in (first, second):
        assert wait_for_metrics(dht, lambda metrics: len(metrics) == 2) == reports

    newer = TrainerMetrics(epoch=4, samples=1)
    store_metrics(first, RUN, first_key, newer, expiration=61)
    assert wait_for_metrics(second, lambda metrics: metrics[first_key].epoch == 4)[first_key] == newer
    assert fetch_metrics(second, "another run") == {}


VALID = TrainerMetrics(epoch=9, samples=8).dict()
DAMAGED = [
    {**VALID, "loss": math.nan},
    {**VALID, "mlm_loss": math.inf},
    {**VALID, "samples_per_second": math.nan},
    {**VALID, "samples": -1},
    {**VALID, "samples": "8"},
    {**VALID, "epoch": 9.0},
    {**VALID, "epoch": True},
    {**VALID, "loss": "high"},
    {"loss": 1.0},
    [9, 8],
    "text",
    None,
]


@pytest.mark.parametrize("value", DAMAGED, ids=str)
def test_fetch_metrics_leaves_out_damaged_records(value):
    values = {b"honest": SimpleNamespace(value=VALID), b"other": SimpleNamespace(value=value)}
    dht = SimpleNamespace(get=lambda key, latest: SimpleNamespace(value=values))
    assert fetch_metrics(dht, RUN) == {b"honest": TrainerMetrics(**VALID)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["time", "samples_per_second"])
def test_progress_that_no_view_could_show_is_left_out(field, value):
    good = {"peer_id": b"x", "epoch": 1, "samples_accumulated": 2, "samples_per_second": 1.0, "time": 5.0,
            "client_mode": False}  # fmt: skip
    entries = {b"honest": good, b"other": {**good, field: value}}
    found = {owner: SimpleNamespace(value=record, expiration_time=1000.0) for owner, record in entries.items()}
    dht = SimpleNamespace(get=lambda key, latest: SimpleNamespace(value=found))
    assert set(fetch_progress(dht, RUN)) == {short_peer_name(b"honest")}


def test_metrics_that_are_not_finite_cannot_even_be_made():
    for name in ("loss", "mlm_loss", "sop_loss", "samples_per_second"):
        with pytest.raises(pydantic.ValidationError):
            TrainerMetrics(epoch=1, **{name: math.nan})


def test_records_of_strangers_and_under_the_key_of_another_peer_are_refused(swarm):
    (first, first_key), (second, second_key), (stranger, stranger_key) = swarm
    own = TrainerMetrics(epoch=5, samples=5)
    store_metrics(first, RUN, first_key, own, expiration=120)
    for dht in (first, second):
        wait_for_metrics(dht, lambda metrics: first_key in metrics and metrics[first_key].epoch == 5)
    later = get_dht_time() + 300  # of two valid records the one that expires later would win

    def forge(dht, subkey, value) -> None:
        dht.store(key=f"{RUN}_metrics", subkey=subkey, value=value, expiration_time=later)

    forge(second, first_key, TrainerMetrics(epoch=6).dict())
    forge(stranger, first_key, TrainerMetrics(epoch=7).dict())
    forge(stranger, stranger_key, TrainerMetrics(epoch=8).dict())
    for dht in (first, second):
        metrics = fetch_metrics(dht, RUN)
        assert metrics[first_key] == own
        assert set(metrics) <= {first_key, second_key}


def test_fetch_metrics_survives_a_record_that_is_no_dictionary(swarm):
    (first, first_key), _, (stranger, _) = swarm
    store_metrics(first, RUN, first_key, TrainerMetrics(epoch=5), expiration=400)
    stranger.store(key=f"{RUN}_metrics", value=[1, 2], expiration_time=get_dht_time() + 500)
    wait_for_metrics(first, lambda metrics: first_key in metrics)
    plain = SimpleNamespace(get=lambda key, latest: SimpleNamespace(value=[1, 2]))
    assert fetch_metrics(plain, RUN) == {}


def test_stored_epochs_reach_other_peers_and_nobody_speaks_for_another_or_without_a_signature(swarm):
    (first, first_key), (second, second_key), (stranger, stranger_key) = swarm

    def wait_for(dht, expected) -> None:
        give_up_at = time.monotonic() + 30
        while (found := fetch_checkpoint_epochs(dht, RUN)) != expected:
            assert time.monotonic() < give_up_at, found
            time.sleep(0.05)

    store_checkpoint_epoch(first, RUN, first_key, 0, expiration=60)
    store_checkpoint_epoch(second, RUN, second_key, 40, expiration=60)
    wait_for(first, {first_key: 0, second_key: 40})
    store_checkpoint_epoch(first, RUN, first_key, 20, expiration=61)
    wait_for(second, {first_key: 20, second_key: 40})

    def forge(dht, subkey, value) -> None:
        dht.store(key=f"{RUN}_checkpoints", subkey=subkey, value=value, expiration_time=get_dht_time() + 300)

    forge(stranger, first_key, {"epoch": 100})
    forge(stranger, stranger_key, {"epoch": 100})
    for value in ({"epoch": -1}, {"epoch": 20.0}, {"epoch": True}, {}, 20, "20"):
        forge(first, first_key, value)
    for dht in (first, second):
        assert fetch_checkpoint_epochs(dht, RUN) == {first_key: 20, second_key: 40}
    forge(second, first_key, {"epoch": 100})  # hivemind may leave it in the cache of the node that forges
    assert fetch_checkpoint_epochs(first, RUN) == {first_key: 20, second_key: 40}


@pytest.mark.parametrize("value", [{"epoch": -1}, {"epoch": "20"}, {"epoch": 2.5}, {}, [20], "text", None], ids=str)
def test_fetch_checkpoint_epochs_leaves_out_damaged_records(value):
    values = {b"honest": SimpleNamespace(value={"epoch": 20}), b"other": SimpleNamespace(value=value)}
    dht = SimpleNamespace(get=lambda key, latest: SimpleNamespace(value=values))
    assert fetch_checkpoint_epochs(dht, RUN) == {b"honest": 20}


def test_stored_epoch_ends_with_the_peer_that_says_it(swarm):
    (first, _), (second, second_key), _ = swarm
    store_checkpoint_epoch(second, "short", second_key, 1, expiration=2)
    give_up_at = time.monotonic() + 10
    while not fetch_checkpoint_epochs(first, "short"):
        assert time.monotonic() < give_up_at
    time.sleep(2.5)
    assert fetch_checkpoint_epochs(first, "short") == {}


def test_visible_addresses_come_public_first_and_loopback_last():
    tail = f"/tcp/31337/p2p/{SOME_PEER_ID}"
    ranked = [
        ["/ip4/93.184.216.34", "/ip4/172.217.0.1", "/ip6/2a00:1450::1", "/dns4/peer.example.org"],
        ["/ip4/10.0.0.5", "/ip4/192.168.1.5", "/ip4/172.17.0.2", "/ip4/169.254.0.7", "/ip6/fe80::1"],
        ["/ip4/127.0.0.1", "/ip6/::1"],
    ]
    shuffled = [host + tail for group in reversed(ranked) for host in group]
    dht = SimpleNamespace(get_visible_maddrs=lambda latest: shuffled)
    addresses = [address.removesuffix(tail) for address in visible_addresses(dht)]
    for group in ranked:
        assert set(addresses[: len(group)]) == set(group)
        del addresses[: len(group)]


# -- a node that gives no answer


async def lose_what_is_asked(_dht, node) -> None:
    async def for_ever(*args, **kwargs):
        await asyncio.sleep(1e6)

    node.get = node.store = for_ever


async def ask_nobody(_dht, _node) -> None:
    await asyncio.sleep(1e6)


async def hang_for_a_moment(_dht, _node) -> None:
    time.sleep(4)


end_of_the_deadlock = multiprocessing.Event()


async def hang(_dht, _node) -> None:
    end_of_the_deadlock.wait(60)  # a deadlock of the node's process; that of a test must end


def test_question_that_gets_lost_in_the_network_stops_nobody(monkeypatch, shut_down_at_end):
    monkeypatch.setattr(dht_module, "LONGEST_ANSWER", 0.5)  # before the node's process is forked
    node, _ = start_dht(peer_arguments(), Identity(RSAPrivateKey()))
    shut_down_at_end(node)
    node.run_coroutine(lose_what_is_asked)
    assert node.get("key", latest=True, return_future=True).result(20) is None
    assert node.store("key", 1, get_dht_time() + 9, return_future=True).result(20) is False
    with pytest.raises(TimeoutError, match="the DHT had no answer within"):
        node.run_coroutine(ask_nobody, return_future=True).result(20)


def test_nobody_waits_for_a_node_s_process_for_ever(monkeypatch, shut_down_at_end):
    node, _ = start_dht(peer_arguments(), Identity(RSAPrivateKey()))
    shut_down_at_end(node)
    monkeypatch.setattr(dht_module, "LONGEST_ANSWER", 0.2)  # in this process only
    node.run_coroutine(hang_for_a_moment, return_future=True)
    for ask in (lambda: node.get("key"), lambda: node.store("key", 1, get_dht_time() + 9), node.get_visible_maddrs):
        with pytest.raises(TimeoutError, match="the DHT process has been silent for 0 s"):
            ask()


@pytest.mark.timeout(120)
def test_watchdog_notices_that_a_node_s_process_hangs(monkeypatch, shut_down_at_end):
    for name, seconds in (("ASK_SECONDS", 0.1), ("OVERDUE_SECONDS", 1.0), ("ASLEEP_SECONDS", 1.0)):
        monkeypatch.setattr(watchdog, name, seconds)
    node, _ = start_dht(peer_arguments(), Identity(RSAPrivateKey()))
    shut_down_at_end(node)
    pid, ask = watchdog._watched["the DHT process"]
    assert pid == node.pid
    questions = watchdog.Questions("the DHT process", pid, ask)
    questions.start()
    try:
        look_until = time.monotonic() + 3.0
        while time.monotonic() < look_until:
            assert questions.objection() == ""
            time.sleep(0.1)
        node.run_coroutine(hang, return_future=True)
        give_up_at = time.monotonic() + 50
        while not (objection := questions.objection()):
            assert time.monotonic() < give_up_at
            time.sleep(0.1)
        assert objection.startswith("has answered nothing for") and objection.endswith(": it hangs")
    finally:
        questions.is_over = True
        end_of_the_deadlock.set()  # it must shut down
