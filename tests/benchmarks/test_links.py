"""Emulated links are what they say, and leave nothing behind; what the bench of links makes of its figures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import emulated_links
from benchmarks.emulated_links import Link, Network, command, namespaces_named, own_namespace, read_counters

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
import socket, statistics, sys, time
client = socket.socket(type=socket.SOCK_DGRAM)
client.settimeout(2.0)
took = []
for number in range(21):
    began = time.monotonic()
    client.sendto(b"?", (sys.argv[1], 5000))
    client.recv(2000)
    took.append(time.monotonic() - began)
print(1000 * statistics.median(took))
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
import time
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


def start(host, program: str, *arguments: object) -> subprocess.Popen:
    words = [*host.prefix, sys.executable, "-I", "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def measure(receiver, receiving: str, sender, sending: str, *arguments: object) -> float:
    """What either program prints at last."""
    with start(receiver, receiving) as first:
        assert first.stdout.readline() == "ready\n"
        with start(sender, sending, receiver.address, *arguments) as second:
            said = second.communicate(timeout=30)[0]
        assert second.returncode == 0
        if said:
            first.kill()
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
    with start(hidden, RECEIVE) as server:
        assert server.stdout.readline() == "ready\n"
        for address in "10.77.1.2", hidden.address:  # the router's own, and one that nobody outside knows
            with subprocess.Popen([*other.prefix, sys.executable, "-I", "-c", SEND, address, "0.1"],
                                  stderr=subprocess.PIPE, text=True) as caller:  # fmt: skip
                assert "Error" in caller.communicate(timeout=30)[1] and caller.returncode == 1
        server.kill()


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


def test_network_lies_in_its_own_namespaces_and_goes_with_them(rights):
    def outside() -> list[str]:
        return [command("ip", "-o", "link"), command("iptables", "-S"), command("iptables", "-t", "nat", "-S")]

    before = [line.split("\\")[0] for line in outside()]
    with pytest.raises(ZeroDivisionError), Network() as network:
        network.add("home", Link(100, 20, delay=40, loss=0.01, nat=True))
        assert [line.split("\\")[0] for line in outside()] == before
        assert len(namespaces_named(own_namespace(""))) == 3
        raise ZeroDivisionError
    assert namespaces_named(own_namespace("")) == []
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


def test_network_goes_with_whatever_runs_in_it(rights):
    with Network() as network:
        sleeper = start(network.add("home", Link(100, 100)), "import time; time.sleep(60)")
        time.sleep(0.2)
    assert sleeper.wait(10) == -signal.SIGKILL
    sleeper.stdout.close()


def test_without_rights_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert emulated_links.what_lacks() == "only root may make network namespaces"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(emulated_links.shutil, "which", lambda program: None if program == "iptables" else program)
    assert emulated_links.what_lacks().startswith("there is no iptables (Debian:")
    monkeypatch.setattr(emulated_links.shutil, "which", lambda program: program)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert emulated_links.what_lacks() == "there is no /dev/net/tun"
