"""Emulated links are what they say, and leave nothing behind; what the bench of links makes of its figures."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import emulated_links, links
from benchmarks.emulated_links import Link, Network, Traffic, command, namespaces_named, own_name, read_counters

# Each runs in a host's namespace. The receiver prints what it has measured: Mbit/s, or the number of packets.
RECEIVE = """
import socket, time
server = socket.create_server(("", 5000))
print("ready", flush=True)
connection, _ = server.accept()
received, began = len(connection.recv(1 << 16)), time.monotonic()
while chunk := connection.recv(1 << 16):
    received += len(chunk)
print(received * 8 / 1e6 / (time.monotonic() - began))
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=3.0) as connection:
    connection.sendall(bytes(int(float(sys.argv[2]) * 1e6)))
"""
ECHO = """
import socket
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("", 5000))
print("ready", flush=True)
while True:
    server.sendto(*server.recvfrom(2000))
"""
PING = """
import socket, sys, time
client = socket.socket(type=socket.SOCK_DGRAM)
client.settimeout(2.0)
took = []
for number in range(21):
    began = time.monotonic()
    client.sendto(b"?", (sys.argv[1], 5000))
    client.recv(2000)
    took.append(time.monotonic() - began)
print(1000 * min(took))  # a busy machine makes some slower
"""
COUNT = """
import socket
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("", 5000))
print("ready", flush=True)
server.recv(2000)
server.settimeout(0.5)
count = 1
try:
    while server.recv(2000):
        count += 1
except TimeoutError:
    print(count)
"""
SPRINKLE = """
import socket, sys, time
client = socket.socket(type=socket.SOCK_DGRAM)
for number in range(3000):
    client.sendto(b"?", (sys.argv[1], 5000))
    if number % 30 == 0:
        time.sleep(0.01)
"""
MAKE_A_NETWORK = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background of a shell ignore it
from benchmarks.emulated_links import Link, Network
with Network() as network:
    network.add("left", Link(10, 10, delay=10, nat=True))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def rights():
    reason = emulated_links.what_lacks()
    if reason:
        pytest.skip(f"links cannot be emulated: {reason}")


@pytest.fixture
def network(rights):
    with Network() as network:
        yield network


@contextlib.contextmanager
def running(host, program: str, *arguments: object):
    words = [*host.prefix, sys.executable, "-I", "-c", program, *map(str, arguments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def measure(receiver, receiving: str, sender, sending: str, *arguments: object) -> float:
    """What either program prints at last."""
    with running(receiver, receiving) as first:
        assert first.stdout.readline() == "ready\n"
        with running(sender, sending, receiver.address, *arguments) as second:
            said, error = second.communicate(timeout=30)
        assert second.returncode == 0, error
        return float(said or first.communicate(timeout=30)[0])


@pytest.mark.swarm
@pytest.mark.parametrize("delay", [0.0, 10.0], ids=["cable", "delayed"])
def test_links_have_the_rates_that_were_asked_for(network, delay):
    home = network.add("home", Link(down=50, up=10, delay=delay))
    other = network.add("other", Link(down=1000, up=1000))
    assert measure(other, RECEIVE, home, SEND, 2.0) == pytest.approx(10, rel=0.15)
    assert measure(home, RECEIVE, other, SEND, 10.0) == pytest.approx(50, rel=0.15)
    assert network.traffic()["home"].overruns == 0


@pytest.mark.swarm
def test_program_that_delays_can_carry_the_fastest_delayed_link(network):
    """Prints what it can carry: `pytest -m swarm -s -k carry_the_fastest tests/benchmarks/test_links.py`."""
    fastest = max(max(link.up, link.down) for link in links.LINKS.values() if link.delay)
    quick, other = network.add("quick", Link(10_000, 10_000, delay=10)), network.add("other", Link(10_000, 10_000))
    carried = measure(other, RECEIVE, quick, SEND, 40.0)
    print(f"carried {carried:.0f} Mbit/s")
    assert carried > 1.1 * fastest


@pytest.mark.swarm
def test_link_delays_packets_there_and_back(network):
    near, far = network.add("near", Link(100, 100, delay=30)), network.add("far", Link(100, 100, delay=50))
    assert measure(far, ECHO, near, PING) == pytest.approx(30 + 50, rel=0.2)


@pytest.mark.swarm
def test_link_loses_packets_in_both_directions(network):
    poor, other = network.add("poor", Link(100, 100, loss=0.1)), network.add("other", Link(100, 100))
    assert measure(other, COUNT, poor, SPRINKLE) == pytest.approx(3000 * 0.9, rel=0.04)
    assert measure(poor, COUNT, other, SPRINKLE) == pytest.approx(3000 * 0.9, rel=0.04)


def test_host_behind_a_router_calls_and_is_not_called(network):
    hidden = network.add("hidden", Link(100, 100, nat=True))
    other = network.add("other", Link(100, 100))
    assert measure(other, RECEIVE, hidden, SEND, 0.1) > 0
    with running(hidden, RECEIVE) as server:
        assert server.stdout.readline() == "ready\n"
        # the router's own address, which drops it without a word, and one that nobody outside knows
        for address, error in (("10.77.1.2", "TimeoutError"), (hidden.address, "Error")):
            with running(other, SEND, address, 0.1) as caller:
                assert error in caller.communicate(timeout=30)[1] and caller.returncode == 1


def test_interfaces_count_what_each_host_sends_and_receives(network):
    first, second = network.add("first", Link(100, 100)), network.add("second", Link(100, 100, delay=2))
    before = network.traffic()
    measure(second, RECEIVE, first, SEND, 1.0)
    first_sent, second_sent = (network.traffic()[name] - before[name] for name in ("first", "second"))
    assert first_sent.up == pytest.approx(1e6, rel=0.1) and second_sent.down == pytest.approx(1e6, rel=0.1)
    assert first_sent.down < 1e5 and second_sent.up < 1e5


def test_what_the_router_receives_is_what_a_host_has_sent():
    counters = {"rx": {"bytes": 1, "dropped": 7}, "tx": {"bytes": 2, "dropped": 3}}
    traffic = read_counters({"ifname": "home", "stats64": counters})
    assert (traffic.up, traffic.down, traffic.overruns) == (1, 2, 3)


@pytest.mark.swarm  # alone: others may change what lies outside
def test_network_lies_in_its_own_names_and_goes_with_them(rights):
    def outside() -> list[str]:
        return [command("ip", "-o", "link"), command("iptables", "-S"), command("iptables", "-t", "nat", "-S")]

    before = [line.split("\\")[0] for line in outside()]
    with pytest.raises(ZeroDivisionError), Network() as network:
        network.add("home", Link(100, 20, delay=40, loss=0.01, nat=True))
        assert [line.split("\\")[0] for line in outside()] == before
        assert len(namespaces_named(own_name(""))) == 3
        raise ZeroDivisionError
    assert namespaces_named(own_name("")) == []
    assert [line.split("\\")[0] for line in outside()] == before


def test_network_of_a_killed_program_goes_when_the_next_one_is_made(rights):
    with subprocess.Popen([sys.executable, "-c", MAKE_A_NETWORK], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "ready\n"
        left = f"{emulated_links.PREFIX}-{program.pid}-"
        with Network():
            assert len(namespaces_named(left)) == 3  # its owner lives
        program.kill()
    assert len(namespaces_named(left)) == 3
    with Network():
        assert namespaces_named(left) == []


def test_network_goes_when_its_program_is_interrupted(rights):
    with subprocess.Popen(
        [sys.executable, "-c", MAKE_A_NETWORK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
    assert namespaces_named(f"{emulated_links.PREFIX}-{program.pid}-") == []


def test_network_goes_with_whatever_runs_in_it(rights):
    with Network() as network, running(network.add("home", Link(100, 100)), "import time; time.sleep(60)") as sleeper:
        time.sleep(0.2)
        network.__exit__()
        assert sleeper.wait(10) == -signal.SIGKILL


def test_without_rights_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert emulated_links.what_lacks() == "only root may make network namespaces"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(emulated_links.shutil, "which", lambda program: None if program == "iptables" else program)
    assert emulated_links.what_lacks().startswith("there is no iptables (Debian:")
    monkeypatch.setattr(emulated_links.shutil, "which", lambda program: program)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert emulated_links.what_lacks() == "there is no /dev/net/tun"


# -- what the bench makes of counters and metrics files ---------------------------------------------------------------

PAIR = links.Part("pair", {"helper": Link(100, 100), "trainer": Link(100, 20), "client": Link(100, 20, nat=True)})


def epoch_record(moment: float, number: int, *, waited: float) -> dict:
    return {"event": "epoch", "time": moment, "epoch": number, "samples": 80, "seconds": 10.0, "waited_seconds": waited}


def round_records(moment: float, step: int, *, search: float, averaging: float, complete: bool = True) -> list[dict]:
    began = moment - search - averaging
    phases = {"matchmaking": began, "averaging": began + search, "idle": moment}
    return [
        *({"event": "phase", "kind": "gradients", "step": step, "phase": phase, "time": time}
          for phase, time in phases.items()),
        {"event": "round", "kind": "gradients", "time": moment, "epoch": step, "num_peers": 2, "error": "",
         "complete": complete},
    ]  # fmt: skip


def trainer_records(*, waited: float, averaging: float) -> list[dict]:
    """Four epochs of ten seconds, ended at 10, 20, 30 and 40; of the last two the rounds are incomplete."""
    records = [{"event": "start", "time": 0.0}]
    for number in range(1, 5):
        records += round_records(10.0 * number - 1, number, search=1.0, averaging=averaging, complete=number < 3)
        records.append(epoch_record(10.0 * number, number, waited=waited))
    return records


@pytest.fixture
def summary() -> dict:
    first = links.Snapshot(20.0, 2, {name: Traffic(100, 200, 0) for name in PAIR.links})
    after = {
        "helper": Traffic(100, 200, 0),
        "trainer": Traffic(10_000_100, 200, 0),
        "client": Traffic(100, 4_000_200, 3),
    }
    records = {
        "trainer": trainer_records(waited=2.0, averaging=4.0),
        "client": trainer_records(waited=4.0, averaging=6.0),
    }
    return links.summarise(PAIR, first, links.Snapshot(40.0, 4, after), records)


def test_bench_divides_what_interfaces_counted_by_epochs_and_samples(summary):
    assert (summary["epochs"], summary["samples"], summary["seconds_an_epoch"]) == (2, 4 * 80, 10.0)
    trainer, client = summary["peers"]["trainer"], summary["peers"]["client"]
    assert (trainer["up_bytes_an_epoch"], trainer["down_bytes_an_epoch"]) == (5_000_000, 0)
    assert trainer["up_bytes_a_sample"] == 31250.0 and client["down_bytes_a_sample"] == 12500.0
    assert trainer["seconds_an_epoch_at_full_rate"] == 5_000_000 * 8 / 20e6  # up at 20 Mbit/s
    assert summary["busiest"] == "trainer" and summary["overruns"] == 3
    assert {name: peer["role"] for name, peer in summary["peers"].items()} == {
        "helper": "helper", "trainer": "reachable", "client": "client"
    }  # fmt: skip


def test_bench_counts_a_trainers_time_between_the_snapshots_only(summary):
    trainer, client = summary["peers"]["trainer"], summary["peers"]["client"]
    assert trainer["computing"] == 0.8 and client["computing"] == 0.6
    assert (trainer["rounds"], trainer["complete_rounds"]) == (2, 0)
    assert (trainer["matchmaking_seconds"], trainer["averaging_seconds"]) == (1.0, 4.0)
    assert "computing" not in summary["peers"]["helper"]


def test_bench_counts_groups_by_their_members():
    def member(size: int) -> list[dict]:
        return [{"event": "round", "kind": "gradients", "epoch": 7, "num_peers": size, "error": ""}]

    assert links.groups({"a": member(2), "b": member(2), "c": member(3), "d": member(3), "e": member(3)}) == 2.0
    assert links.groups({"a": member(2), "b": []}) is None  # not all have told


def test_search_without_a_group_is_no_round():
    records = round_records(9.0, 1, search=1.0, averaging=2.0)
    records += [one for one in round_records(19.0, 2, search=1.0, averaging=2.0) if one.get("phase") != "averaging"]
    assert links.phases(records, since=0.0) == ([1.0], [2.0])


def test_table_has_a_line_for_each_role_and_the_busiest_peer(summary):
    shown = links.table({"parts": {"pair": summary}}).splitlines()
    assert [line.split(" | ")[1] for line in shown[2:6]] == ["reachable", "client", "helper", "busiest: trainer"]
    assert shown[2].startswith("| pair | reachable | 5 | 0 | ") and shown[2].endswith("| 1 | 4 | 2 | 80 |")
    assert "NOT FAITHFUL" in shown[-1] and "0 of 4 gradient rounds complete" in shown[-1]


def test_bench_measures_all_profiles_and_the_crowd_unless_asked_for_less():
    def names(*words: str) -> list[str]:
        return [part.name for part in links.chosen_parts(links.parse_arguments(list(words)))]

    assert names() == ["lan", "fibre", "home", "poor", "mixed", "crowd"]
    assert names("--profile", "home") == ["home"] and names("--part", "published") == ["published"]
    seconds = (links.START_SECONDS + links.MEASURE_SECONDS) * (len(names()) + 1)
    assert seconds <= 3600


def test_bench_without_rights_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["links", "--profile", "home"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert links.main() == 2
    assert capsys.readouterr().err == (
        "benchmarks.links: skipped: links cannot be emulated: only root may make network namespaces\n"
    )


def test_bench_needs_memory_for_the_published_size(monkeypatch):
    monkeypatch.setattr(links.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    assert links.why_not([links.published()]) == "the published size needs 20 GB of memory, 8 are available"


def test_only_names_of_programs_that_have_ended_are_abandoned():
    with subprocess.Popen(["sleep", "0"]) as ended:
        pass
    assert emulated_links.is_abandoned(f"{emulated_links.PREFIX}-{ended.pid}-1-router")
    assert emulated_links.is_abandoned(f"{emulated_links.PREFIX}-{os.getpid()}-1-router")  # one that had this id before
    assert not emulated_links.is_abandoned(own_name("router"))
    assert not emulated_links.is_abandoned(f"{emulated_links.PREFIX}-somebody-elses")


def test_folders_of_killed_runs_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = [own_name("present"), f"{emulated_links.PREFIX}-{os.getpid()}-1-killed", "other"]
    for name in names:
        (tmp_path / name / "helper").mkdir(parents=True)
    links.remove_folders_of_killed_runs()
    assert {path.name for path in tmp_path.iterdir()} == {names[0], "other"}


def test_peers_are_started_where_they_live_and_clients_as_clients(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(links, "LocalPeer", lambda name, script, arguments, **kwargs: started.append(
        (script, " ".join(map(str, arguments)), kwargs["prefix"])))  # fmt: skip
    for name, link in PAIR.links.items():
        host = emulated_links.Host(name, f"{name}-space", "10.77.9.2", link)
        links.start_peer(PAIR, host, tmp_path / "config.json", ["/ip4/10.77.1.2/tcp/1/p2p/Qm"])
    (helper, helped, _), (_, trained, prefix), (script, client, _) = started
    assert helper == "run_aux_peer.py" and "--assist_in_averaging" in helped and script == "-m"
    assert prefix == ["ip", "netns", "exec", "trainer-space"] and "--host_maddrs /ip4/10.77.9.2/tcp/0" in trained
    assert "--client_mode" in client and "--client_mode" not in trained + helped
    assert "--target_batch_size 320" in trained and "--wait_for_peers 2" in trained  # 2 x 10 batches of 16


def test_part_that_ends_no_epoch_in_time_fails_and_one_that_ends_few_does_not(tmp_path):
    swarm = SimpleNamespace(peers=[])
    for name in PAIR.trainers:
        metrics = links.metrics_of(PAIR, tmp_path, name)
        metrics.parent.mkdir(parents=True)
        metrics.write_text(json.dumps({"event": "epoch", "time": 1.0, "epoch": 3}) + "\n", encoding="utf-8")
    links.wait_for_epoch(9, PAIR, tmp_path, swarm, give_up_at=0.0, least=3)
    with pytest.raises(RuntimeError, match="pair: after the longest time allowed, trainers are in epoch 3 only"):
        links.wait_for_epoch(4, PAIR, tmp_path, swarm, give_up_at=0.0)
    swarm.peers.append(SimpleNamespace(name="client", lines=["no room"], process=subprocess.Popen(["false"])))
    swarm.peers[0].process.wait()
    with pytest.raises(RuntimeError, match="client ended with code 1:\nno room"):
        links.wait_for_epoch(4, PAIR, tmp_path, swarm, give_up_at=time.monotonic() + 60)
