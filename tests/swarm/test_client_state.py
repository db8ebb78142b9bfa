"""A swarm of clients, to whom nobody can connect, keeps its state: auxiliary peers take it from them and hand it on.

The long test is a whole run behind routers (`pytest -m slow`; skipped without the rights to emulate them).
"""

import contextlib
import time

import hivemind
import pytest
import torch

from benchmarks import emulated_links
from benchmarks.emulated_links import Link, Network
from src.models import LeanAlbertForPreTraining
from src.process.local_swarm import LocalPeer
from src.swarm.averagers import LeanStateAverager
from tests.swarm.test_join import ONE_THREAD

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
EPOCH = 7  # of the swarm


@pytest.fixture
def start_peers():
    with contextlib.ExitStack() as stack:
        nodes = []

        def start(value: float, *, client: bool = True) -> LeanStateAverager:
            """A client, or an auxiliary peer, whose parameters have this value; the first one is known to all."""
            known = [str(address) for node in nodes[:1] for address in node.get_visible_maddrs()]
            where = {"no_listen": True} if client else {"host_maddrs": [LOOPBACK]}
            nodes.append(hivemind.DHT(start=True, initial_peers=known, client_mode=client, **where))
            stack.callback(nodes[-1].shutdown)
            averager = LeanStateAverager(
                dht=nodes[-1],
                params=[{"params": [torch.nn.Parameter(torch.full((2000,), value))]}],
                optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
                initialize_optimizer=False,
                prefix="clients",
                client_mode=client,
                auxiliary=not client,
                request_timeout=1.0,
                next_chunk_timeout=6.0,
                declare_state_period=60.0,
                start=True,
            )
            stack.callback(averager.shutdown)
            averager.swarm_epoch = lambda: EPOCH
            return averager

        yield start


def wait_until_offered(averager: LeanStateAverager, key: str, *, number: int) -> None:
    give_up_at = time.monotonic() + 20
    while len(getattr(averager.dht.get(f"clients.{key}", latest=True), "value", ())) < number:
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


def values(averager: LeanStateAverager) -> set[float]:
    (parameter,) = averager.optimizer.param_groups[0]["params"]
    return set(parameter.tolist())


@pytest.mark.timeout(200)
def test_state_of_clients_goes_through_an_auxiliary_peer_to_whoever_joins(start_peers):
    helper, honest, other, liar, newcomer = start_peers(0.0, client=False), *map(start_peers, (1.0, 1.0, 500.0, 0.0))
    for client, epoch in ((honest, 5), (other, 5), (liar, 6)):
        client.local_epoch = epoch
        client.offer_state(epoch)
    wait_until_offered(helper, "all_clients", number=3)
    newcomer.load_state_from_peers(timeout=30)
    assert not newcomer.has_taken_state, "nobody can call a client"
    helper.local_epoch = -1
    helper.load_state_from_peers(timeout=30)
    assert helper.took_state_of_client and helper.local_epoch == 5 and values(helper) == {1.0}
    ((refused, reason),) = helper.take_refusals()
    assert refused == str(liar.peer_id) and "has another one" in reason, "another client is the witness"
    helper.state_sharing_priority, helper.allow_state_sharing = 5, True
    wait_until_offered(newcomer, "all_averagers", number=1)
    newcomer.load_state_from_peers(timeout=30)
    assert newcomer.has_taken_state and not newcomer.took_state_of_client and values(newcomer) == {1.0}
    assert newcomer.local_epoch == EPOCH, "there is no newer state, and the swarm is where it is"
    newcomer.final_epoch = newcomer.local_epoch = EPOCH - 1
    newcomer._go_on_from_kept_state()
    assert newcomer.local_epoch == EPOCH - 1, "the state of the last epoch is one that was trained"


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.timeout(900)
def test_run_of_clients_behind_routers_keeps_its_state(tmp_path):
    """Two clients that nobody has told that they are; a third joins at epoch 10 and averages; all trainers end, and
    start again; the checkpoint of the last epoch opens."""
    reason = emulated_links.what_lacks()
    if reason:
        pytest.skip(f"links cannot be emulated: {reason}")
    epochs = 45
    with Network("45.77") as network, contextlib.ExitStack() as stack:
        names = ("helper", "anna", "boris", "vera")
        hosts = {name: network.add(name, Link(1000, 1000, nat=name != "helper")) for name in names}

        def start(name: str, script: str, *arguments: str) -> LocalPeer:
            own = [*arguments, "--output_dir", str(tmp_path / name)]
            peer = LocalPeer(name, script, own, echo=False, environment=ONE_THREAD, prefix=hosts[name].prefix,
                             own_session=True)  # fmt: skip
            stack.callback(peer.stop)
            return peer

        def train(name: str) -> LocalPeer:
            text = ["--dataset_sources", "@demo/corpus/*.txt", "--per_device_train_batch_size", "16"]
            return start(name, "run_trainer.py", "--run_id", "demo", *text, "--initial_peers", address)

        helper = start("helper", "run_aux_peer.py", "@demo/aux.args", "--total_steps", str(epochs))
        address = helper.wait_for_line(r"--initial_peers (/ip4/45\S+)").group(1)
        trainers = [train("anna"), train("boris")]
        for trainer in trainers:
            trainer.wait_for_line("goes on as a client", timeout=200)
            trainer.wait_for_line(f"epoch 10/{epochs}.*averaged with 3 peers", timeout=300)
        vera = train("vera")
        joined = int(vera.wait_for_line(r"joined at epoch (\d+)", timeout=200).group(1))
        assert joined >= 10, vera.output()
        vera.wait_for_line("averaged with 4 peers", timeout=200)
        assert f"--initial_peers {address}" in vera.output().partition("others join with")[2]
        for trainer in (*trainers, vera):
            assert trainer.stop() == 0
        trainers = [train(name) for name in names[1:]]
        for trainer in trainers:
            trainer.wait_for_line("resumed from", timeout=200)
            trainer.wait_for_line(f"trained to the last epoch, {epochs}", timeout=400)
        helper.wait_for_line(f"stored the state of epoch {epochs} in", timeout=120)
        assert all(trainer.stop() == 0 for trainer in trainers)
    model = LeanAlbertForPreTraining.from_pretrained(tmp_path / "helper" / "demo" / "aux" / "checkpoint")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
