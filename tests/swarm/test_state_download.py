"""What it takes to get a state over a home's connection, also when that is interrupted (`make test-all`; skipped
without the rights to emulate connections)."""

import ctypes
import multiprocessing
import threading
import time
from types import SimpleNamespace

import hivemind
import pytest
import torch

from benchmarks import emulated_links
from benchmarks.emulated_links import Link, Network, inside, pids_in
from src.swarm.averagers import LeanStateAverager
from src.swarm.state_download import START_ALLOWANCE, StateReceiver
from src.swarm.state_transfer import LEAST_RATE_OF_ONLY_DONOR

NUM_VALUES = 40_000_000  # 160 MB
CHECK_SECONDS = 5.0  # to find a donor, and to look at all values, on a busy machine
INTERRUPTION = 20.0  # seconds; longer than a donor is waited for, so that the download breaks off


def make_averager(node, value: float, num_values: int) -> LeanStateAverager:
    return LeanStateAverager(
        dht=node,
        params=[{"params": [torch.nn.Parameter(torch.full((num_values // 4,), value)) for _ in range(4)]}],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        initialize_optimizer=False,
        offload_optimizer=False,
        prefix="download",
        request_timeout=3.0,
        next_chunk_timeout=10.0,
        start=True,
    )


def live(host, initial_peers: list[str], pipe) -> None:
    """In a process of its own, in the network of a host: a donor, or, if it knows one, who takes its state."""
    with open(f"/var/run/netns/{host.namespace}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    torch.set_num_threads(1)
    node = hivemind.DHT(start=True, initial_peers=initial_peers, host_maddrs=[f"/ip4/{host.address}/tcp/0"])
    averager = make_averager(node, 0.0 if initial_peers else 1.0, NUM_VALUES)
    averager.local_epoch = 0 if initial_peers else 5
    averager.state_sharing_priority = averager.local_epoch
    pipe.send([str(address) for address in node.get_visible_maddrs()])
    pipe.recv()
    if initial_peers:
        began = time.monotonic()
        averager.load_state_from_peers(timeout=averager.longest_download())
        took = time.monotonic() - began
        ends = {float(one.detach()[place]) for one in averager.optimizer.param_groups[0]["params"] for place in (0, -1)}
        pipe.send((took, averager.local_epoch, ends, averager.take_refusals()))
        pipe.recv()
    averager.shutdown()
    node.shutdown()


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_interrupted", [False, True], ids=["undisturbed", "interrupted"])
def test_newcomer_at_home_takes_hardly_longer_than_its_line(is_interrupted):
    reason = emulated_links.what_lacks()
    if reason:
        pytest.skip(f"links cannot be emulated: {reason}")
    forking, peers, initial = multiprocessing.get_context("fork"), [], []
    with Network() as network:
        try:
            for name, link in {"donor": Link(100, 100, delay=20), "home": Link(100, 20, delay=40)}.items():
                host = network.add(name, link)
                pipe, other_end = forking.Pipe()
                process = forking.Process(target=live, args=(host, initial, other_end))
                process.start()
                peers.append((process, pipe))
                assert pipe.poll(120), f"nothing from {name}"
                initial = initial or pipe.recv()[:1]
            peers[1][1].recv()
            time.sleep(3.0)  # until the donor has told that it has a state
            peers[1][1].send("go")
            if is_interrupted:
                cut = "FORWARD", "-i", "home", "-j", "DROP"
                time.sleep(5.0)
                inside(network.router, "iptables", "-I", *cut)
                threading.Timer(INTERRUPTION, inside, (network.router, "iptables", "-D", *cut)).start()
            assert peers[1][1].poll(200), "no state"
            took, epoch, values, refusals = peers[1][1].recv()
            used = network.traffic()
        finally:
            for process, pipe in peers:
                pipe.send("end")
                process.join(60)
                process.kill()
            give_up_at = time.monotonic() + 10.0  # torch's helper ends by itself, and leaves nothing
            while any(pids_in(host.namespace) for host in network.hosts) and time.monotonic() < give_up_at:
                time.sleep(0.2)
    num_bytes, ideal = 4 * NUM_VALUES, 4 * NUM_VALUES * 8e-6 / 100
    print(f"{num_bytes / 1e6:.0f} MB in {took:.1f} s, {took / ideal:.2f} times bytes / bandwidth; {used['home']}")
    assert (epoch, values, refusals) == (5, {1.0}, [])
    assert took < 1.2 * ideal + CHECK_SECONDS + (INTERRUPTION + 15.0 if is_interrupted else 0.0)
    assert used["home"].down < 1.2 * num_bytes, "what had come before the interruption is not sent again"


def test_time_for_a_download_follows_from_its_bytes():
    def averager_of(num_bytes: int) -> SimpleNamespace:
        tensor = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        return SimpleNamespace(get_current_state=lambda: ({}, [tensor], None))

    assert StateReceiver.longest_download(averager_of(0)) == START_ALLOWANCE
    published = 1_770_000_000  # bytes
    longest = StateReceiver.longest_download(averager_of(published))
    assert longest == START_ALLOWANCE + published / LEAST_RATE_OF_ONLY_DONOR > 86_400
