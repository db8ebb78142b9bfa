"""A joining peer takes a state only from a donor whose state fits, is finite, and is confirmed by another donor."""

import asyncio
import contextlib
import math
import threading
import time
from types import SimpleNamespace

import hivemind
import psutil
import pytest
import torch
from hivemind.optim.state_averager import dump_optimizer_state, load_optimizer_state
from hivemind.utils.crypto import RSAPrivateKey

from src.access.keys import public_key_of
from src.access.ownership import peer_id_of
from src.optim.lamb import CPULAMB8Bit
from src.optim.local_steps import AnchoredLAMB
from src.optim.muon import CPUMuon8Bit
from src.swarm.averagers import LeanStateAverager
from src.swarm.state_check import check_state, far_apart, sample_parameters


def trained(seed: int = 0, *, muon: bool = False) -> tuple[list[torch.nn.Parameter], CPULAMB8Bit]:
    """Two parameters, one with 8-bit statistics, after a step."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((90, 100), (7,))]
    optimizer = CPULAMB8Bit(parameters, lr=0.01, min_8bit_size=8000)
    if muon:
        groups = [{"params": parameters[:1], "num_parts": 3}, {"params": parameters[1:]}]
        optimizer = CPUMuon8Bit(groups, lr=0.01, min_8bit_size=8000)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return parameters, optimizer


def state_of(parameters, optimizer) -> tuple[dict, list[torch.Tensor]]:
    layout, tensors = dump_optimizer_state(optimizer)
    return {"epoch": 3, "optimizer_metadata": layout}, [*(p.detach() for p in parameters), *tensors]


@pytest.mark.parametrize("muon", [False, True])
def test_state_of_an_equal_peer_is_taken(muon):
    own, other = trained(0, muon=muon), trained(1, muon=muon)
    metadata, tensors = state_of(*other)
    check_state(metadata, tensors, parameters=own[0], optimizer=own[1])
    load_optimizer_state(own[1], metadata["optimizer_metadata"], tensors[2:])


def test_state_of_another_optimizer_is_refused():
    own, (metadata, tensors) = trained(muon=True), state_of(*trained())
    with pytest.raises(ValueError, match="tensors instead of"):
        check_state(metadata, tensors, parameters=own[0], optimizer=own[1])


def test_momentum_that_would_carry_parameters_away_is_refused():
    anchor = [torch.randn((90, 100)), torch.zeros(7)]
    optimizer = AnchoredLAMB(anchor, lr=0.01, min_8bit_size=8000, outer_learning_rate=0.7, outer_momentum=0.9)
    metadata, tensors = state_of(anchor, optimizer)
    for tensor in anchor:
        optimizer.state[tensor]["momentum"].fill_(3.0)  # nine steps of one and a half their size, all in one direction
    check_state(metadata, tensors, parameters=anchor, optimizer=optimizer)
    for tensor in anchor:
        optimizer.state[tensor]["momentum"][0] = 2e3
        with pytest.raises(ValueError, match="momentum of 2"):
            check_state(metadata, tensors, parameters=anchor, optimizer=optimizer)
        optimizer.state[tensor]["momentum"].zero_()


def first_value(metadata, usual_type):
    return next(item for item in metadata["optimizer_metadata"] if type(item.get("value")) is usual_type)


def change(kind: str, metadata: dict, tensors: list[torch.Tensor]):
    """Spoil a good state."""
    layout = metadata["optimizer_metadata"]
    statistics = [n for n, tensor in enumerate(tensors) if n >= 2 and tensor.is_floating_point()]
    if kind == "NaN parameter":
        tensors[0][0, 0] = math.nan
    elif kind == "infinite moment":
        tensors[statistics[0]].view(-1)[0] = math.inf
    elif kind == "negative statistics":
        for number in statistics:
            tensors[number].abs_().neg_().sub_(1.0)
    elif kind == "another shape":
        tensors[1] = tensors[1].reshape(7, 1)
    elif kind == "another type":
        tensors[0] = tensors[0].double()
    elif kind == "a tensor less":
        tensors.pop()
    elif kind == "no epoch":
        metadata.pop("epoch")
    elif kind == "epoch as text":
        metadata["epoch"] = "3"
    elif kind == "negative epoch":
        metadata["epoch"] = -1
    elif kind == "no layout":
        metadata["optimizer_metadata"] = None
    elif kind == "a shorter layout":
        layout.pop()
    elif kind == "text for a number":
        first_value(metadata, float)["value"] = "much"
    elif kind == "NaN for a number":
        first_value(metadata, float)["value"] = math.nan
    elif kind == "negative steps":
        for item in layout:
            if item.get("value") == 1 and type(item["value"]) is int:
                item["value"] = -5
    elif kind == "other parameters":
        first_value(metadata, int)["value"] = 5
    elif kind == "tensors swapped":
        items = [item for item in layout if item["type"] == "tensor"]
        items[0]["index"], items[1]["index"] = items[1]["index"], items[0]["index"]


BAD = ("NaN parameter", "infinite moment", "negative statistics", "another shape", "another type", "a tensor less",
       "no epoch", "epoch as text", "negative epoch", "no layout", "a shorter layout", "text for a number",
       "NaN for a number", "negative steps", "other parameters", "tensors swapped")  # fmt: skip


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_bad_state_is_refused_before_anything_changes(kind, muon):
    own, (metadata, tensors) = trained(0, muon=muon), state_of(*trained(1, muon=muon))
    before = [tensor.clone() for tensor in state_of(*own)[1]]
    change(kind, metadata, tensors)
    with pytest.raises(ValueError, match=r"tensor|epoch|structure|order|optimizer state"):
        check_state(metadata, tensors, parameters=own[0], optimizer=own[1])
    for one, other in zip(before, state_of(*own)[1], strict=True):
        assert torch.equal(one, other)


def test_metadata_that_is_no_dictionary_is_refused():
    own = trained()
    with pytest.raises(ValueError, match="no epoch"):
        check_state([1], [], parameters=own[0], optimizer=own[1])


def test_samples_of_peers_that_train_together_are_near_and_those_of_others_are_not():
    parameters = [torch.randn(90, 100) * 0.02, torch.zeros(7), torch.ones(30)]
    samples = sample_parameters(parameters, b"seed")
    assert torch.equal(samples, sample_parameters(parameters, b"seed"))
    assert not torch.equal(samples, sample_parameters(parameters, b"other"))
    nearby = [p * 1.02 + 0.001 for p in parameters]
    assert far_apart(samples, sample_parameters(nearby, b"seed")) == ""
    for spoiled in range(3):
        others = [p + 0.2 * (number == spoiled) * torch.randn(p.shape) * 5 for number, p in enumerate(parameters)]
        assert f"tensor {spoiled}" in far_apart(samples, sample_parameters(others, b"seed"))
    assert far_apart(samples, torch.full_like(samples, math.nan))
    assert far_apart(samples, samples[:1])


# -- whom a newcomer believes -----------------------------------------------------------------------------------------

PEERS = {name: peer_id_of(public_key_of(RSAPrivateKey())) for name in "abcdef"}


@pytest.mark.parametrize(
    ("present", "donor", "liars", "trusted", "taken"),
    [
        ("ab", "a", "", "", True),  # another honest peer says the same
        ("ab", "b", "b", "", False),  # one honest witness contradicts
        ("b", "b", "b", "", True),  # there is none
        ("abcd", "b", "bcd", "", True),  # keys cost nothing: one honest peer is outvoted ...
        ("abcd", "b", "bcd", "a", False),  # ... but not if this peer was started with its address,
        ("bcdefa", "b", "bcdef", "a", False),  # although there are more than are asked,
        ("bcdefa", "a", "bcdef", "a", True),  # and liars can say of its state what they like
        ("bcdefa", "a", "bcdef", "", False),
    ],
)
def test_initial_peers_alone_say_which_state_is_right(present, donor, liars, trusted, taken):
    parameters = {name: trained(2 if name in liars else 1)[0] for name in PEERS}

    async def samples_of(peer, seed):
        (name,) = (name for name in PEERS if PEERS[name] == peer)
        return 7.0, sample_parameters(parameters[name], seed)

    averager = SimpleNamespace(
        _expected_epoch=SimpleNamespace(value=7.0),
        _averaged_tensors=parameters["a"],
        dht=SimpleNamespace(initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{PEERS[name]}" for name in trusted]),
        _samples_of=samples_of,
    )
    donors = [PEERS[name] for name in present]
    compared = LeanStateAverager._compare_donors(averager, PEERS[donor], 7, parameters[donor], donors)
    with contextlib.nullcontext() if taken else pytest.raises(ValueError, match="has another one"):
        asyncio.run(compared)


# -- whole downloads --------------------------------------------------------------------------------------------------


class SpoiledAverager(LeanStateAverager):
    """Hands out a state that was spoiled on purpose."""

    spoil = "nothing"

    def get_current_state(self):
        metadata, tensors, infos = super().get_current_state()
        tensors = [tensor.clone() for tensor in tensors]
        if self.spoil == "NaN":
            tensors[0].view(-1)[5] = math.nan
        elif self.spoil == "random":
            tensors[0] = torch.randn(tensors[0].shape)
        elif self.spoil == "options":
            for item in metadata["optimizer_metadata"]:
                if item.get("value") == 0.01:
                    item["value"] = 1e6
        elif self.spoil == "far ahead":
            metadata["epoch"] += 1000
        return metadata, tensors, infos


SpoiledAverager.__name__ = "LeanStateAverager"  # or its remote calls would not be found


@pytest.fixture
def start_peers():
    """Starts state averagers, each with a node of its own, whose parameters follow from a seed."""
    with contextlib.ExitStack() as stack:
        nodes = []

        def start(seed: int, *, spoil: str = "nothing", epoch: int = 0, **options) -> LeanStateAverager:
            peers = [str(address) for node in nodes for address in node.get_visible_maddrs()]
            node = hivemind.DHT(start=True, initial_peers=peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
            stack.callback(node.shutdown)
            nodes.append(node)
            averager = SpoiledAverager(
                dht=node,
                params=trained(seed)[0],
                optimizer=lambda params: CPULAMB8Bit(params, lr=0.01, min_8bit_size=8000),
                scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
                offload_optimizer=True,
                prefix="donors",
                start=True,
                **{"next_chunk_timeout": 20.0, "declare_state_period": 5.0, **options},
            )
            stack.callback(averager.shutdown)
            averager.spoil, averager.local_epoch, averager.swarm_epoch = spoil, epoch, lambda: 7
            averager.state_sharing_priority = epoch
            return averager

        yield start


def parameters_of(averager) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in averager.main_parameters]


@pytest.mark.timeout(300)
def test_state_is_taken_from_the_first_good_donor_and_bad_ones_are_named(start_peers):
    good, spoiled = start_peers(1, epoch=7), start_peers(1, spoil="NaN", epoch=7)
    newcomer = start_peers(5)  # a witness of nothing: it has just joined, too
    joining = start_peers(2)
    spoiled.state_sharing_priority = 1e9
    taken_from, refused = set(), {}
    for spoil in ("NaN", "far ahead", "random"):
        spoiled.spoil = spoil
        for _ in range(12):  # which of the two is asked first is drawn by lot
            before = parameters_of(joining)
            joining.local_epoch = 0
            joining.load_state_from_peers(timeout=60)
            for peer, reason in joining.take_refusals():
                refused.setdefault(spoil, {})[peer] = reason
            if joining.local_epoch == 7:
                taken_from.add(spoil)
                for one, other in zip(parameters_of(joining), parameters_of(good), strict=True):
                    assert torch.equal(one, other)
            else:
                assert all(torch.equal(a, b) for a, b in zip(parameters_of(joining), before, strict=True))
            if spoil in refused and (spoil in taken_from or spoil == "random"):
                break
            time.sleep(0.5)
    bad = str(spoiled.peer_id)
    assert "not finite" in refused["NaN"][bad] and "claims epoch 1007" in refused["far ahead"][bad], refused
    assert {"NaN", "far ahead"} <= taken_from
    assert "random" not in taken_from or bad in refused["random"]
    assert newcomer.local_epoch == 0


@pytest.mark.timeout(200)
def test_bad_state_changes_no_model_of_an_auxiliary_peer(start_peers):
    """It receives in place, so that what averages with others may be spoiled: it has no values of its own there."""
    donor = start_peers(1, spoil="NaN", epoch=7, declare_state_period=60.0)
    joining = start_peers(2, auxiliary=True)
    time.sleep(2)  # until the donor has told its epoch
    before = parameters_of(joining)
    joining.load_state_from_peers(timeout=60)
    ((_, reason),) = joining.take_refusals()
    assert "not finite" in reason and joining.local_epoch == 0
    assert all(torch.equal(one, other) for one, other in zip(parameters_of(joining), before, strict=True))
    donor.spoil = "nothing"
    joining.load_state_from_peers(timeout=60)
    assert joining.local_epoch == 7
    assert all(torch.equal(one, other) for one, other in zip(parameters_of(joining), parameters_of(donor), strict=True))


@pytest.mark.timeout(200)
def test_options_of_the_optimizer_are_not_taken_from_a_donor(start_peers):
    start_peers(1, spoil="options", epoch=7)
    joining = start_peers(2)
    for _ in range(10):
        joining.load_state_from_peers(timeout=60)
        if joining.local_epoch == 7:
            break
        time.sleep(0.5)
    assert joining.local_epoch == 7
    for group in joining.optimizer.param_groups:
        assert group["initial_lr"] == 0.01 and group["lr"] == pytest.approx(0.01 / 8)


def download_while_standing_still(joining, frozen) -> float:
    """Seconds for which ``joining`` asks for a state while all processes of ``frozen`` are stopped."""
    processes = psutil.Process(frozen.dht.pid).children(recursive=True)
    assert any("p2pd" in process.name() for process in processes)
    for process in processes:
        process.suspend()
    try:
        began = time.monotonic()
        joining.load_state_from_peers(timeout=60)
        return time.monotonic() - began
    finally:
        for process in processes:
            process.resume()


@pytest.mark.timeout(200)
def test_donor_that_stands_still_does_not_keep_a_peer_waiting(start_peers):
    good, frozen = (start_peers(1, epoch=epoch, declare_state_period=60.0) for epoch in (7, 8))
    joining = start_peers(2, next_chunk_timeout=9.0)
    time.sleep(2)  # until both have told their epochs; whoever is ahead is asked first
    seconds = download_while_standing_still(joining, frozen)
    ((peer, reason),) = joining.take_refusals()
    assert peer == str(frozen.peer_id) and "did not answer within 3 s; asking the next donor" in reason
    assert joining.local_epoch == 7 and seconds < 15, "twice 3 s, as a donor and as a witness, not twice 9"
    assert all(torch.equal(one, other) for one, other in zip(parameters_of(joining), parameters_of(good), strict=True))


@pytest.mark.timeout(200)
def test_download_ends_when_its_owner_leaves_the_swarm(start_peers):
    frozen = start_peers(1, epoch=7, declare_state_period=60.0)
    joining = start_peers(2, next_chunk_timeout=60.0)
    time.sleep(2)  # until the donor has told its epoch
    threading.Timer(2.0, joining.patience.end).start()
    seconds = download_while_standing_still(joining, frozen)
    assert 1.5 < seconds < 30 and joining.local_epoch == 0
