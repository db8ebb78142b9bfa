"""Nothing of an honest peer is refused, however unlike the others: by no reducer, and by nobody who is answered."""

import asyncio
import contextlib
import random
import time
from types import SimpleNamespace

import bitsandbytes.functional  # noqa: F401, takes seconds: before averagers fork, as in a trainer
import hivemind
import pytest
import torch
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.partition import AllreduceException
from hivemind.compression import Float16Compression
from hivemind.p2p import PeerID

from src.swarm.allreduce import JudgingAllReduce
from src.swarm.averagers import LeanGradientAverager
from src.swarm.contributions import Judge
from tests.reference.honest_gradients import Peers

pytestmark = pytest.mark.swarm


ROUNDS = 200
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
POOL = 24  # gradients of a kind, of which each round takes one by chance
PART_BYTES = 2**15
GROUPS = {
    "a batch without order labels": ("usual", "no order"),
    "order labels here only": ("no order", "usual", "other language, no order"),
    "batch": ("one sample", "many", "usual"),
    "length": ("short", "long", "one short sample, no order"),
    "language": ("usual", "other language", "other language, no order"),
    "one newcomer's language": ("many", "many", "many of the other language"),
    "one sample against a thousand": ("one sample", "a thousand"),
    "single samples": ("one sample", "one short sample, no order", "one short sample, no order"),
}


@pytest.fixture(scope="module", params=[0, 400], ids=["first epoch", "late epoch"])
def pools(request):
    """Gradients by kind, made when they are first asked for."""
    peers, made = Peers(request.param), {}

    def pool(kind: str):
        if kind not in made:
            made[kind] = peers.gradients(kind, 2 if kind == "a thousand" else POOL)
        return made[kind]

    return pool


def round_of(judges: list[Judge], contributions: list[tuple[list[torch.Tensor], float]]) -> list[str]:
    """What is refused in a round of all peers, the last of which is auxiliary; without a network."""
    ids = tuple(PeerID(bytes([65 + number])) for number in range(len(judges)))
    modes = [AveragingMode.NODE] * (len(ids) - 1) + [AveragingMode.AUX]
    runners = [
        JudgingAllReduce(
            judge=judge,
            p2p=SimpleNamespace(peer_id=peer_id),
            servicer_type=JudgingAllReduce,
            prefix=None,
            group_id=b"group",
            tensors=tensors,
            weight=weight,
            ordered_peer_ids=ids,
            peer_fractions=(1 / len(ids),) * len(ids),
            modes=modes,
            part_size_bytes=PART_BYTES,
        )
        for judge, peer_id, (tensors, weight) in zip(judges, ids, contributions, strict=True)
    ]
    objections, trainers = [], runners[:-1]
    for reducer in runners:
        for index in range(len(reducer.parts_for_local_averaging)):
            parts = [
                runner.tensor_part_container._input_parts_by_peer[reducer.own_index][index][0] for runner in trainers
            ]
            average = reducer._combine(
                index, {sender: (part, trainers[sender].weight) for sender, part in enumerate(parts)}
            )
            for receiver, part in zip(trainers, parts, strict=True):
                try:
                    receiver._check_average(reducer.own_index, index, part, average)
                except AllreduceException as error:
                    objections.append(f"{receiver.own_index} of {reducer.own_index}: {error}")
        objections.extend(f"{reducer.own_index} {refused}" for refused in reducer.refused)
    return objections


def refusals(pools, kinds: tuple[str, ...], *, rounds: int, seed: int, newcomer: bool) -> list[str]:
    """Of so many rounds; each begins with the memory of those before, but the ``newcomer`` (the first) has none."""
    chance = random.Random(seed)

    async def play():
        judges = [Judge(max_weight=2000.0) for _ in range(len(kinds) + 1)]
        refused = []
        for number in range(rounds):
            contributions = [chance.choice(pools(kind)) for kind in kinds]
            contributions.append(([torch.zeros_like(tensor) for tensor in contributions[0][0]], 0.0))
            if newcomer:
                judges[0] = Judge(max_weight=2000.0)
            refused.extend(f"round {number}: {text}" for text in round_of(judges, contributions))
        return refused

    return asyncio.run(play())


@pytest.mark.parametrize("group", GROUPS)
def test_no_honest_peer_is_refused(pools, group):
    assert refusals(pools, GROUPS[group], rounds=ROUNDS, seed=0, newcomer=False) == []


@pytest.mark.timeout(120)
def test_real_peers_average_what_only_one_of_them_has_a_gradient_for(shut_down_at_end):
    """As in a run of small batches, of which every other one has no labels of sentence order."""
    peers = Peers(0)
    given = [peers.gradient(kind)[0] for kind in ("no order", "usual")]
    nodes, averagers = [], []
    for number in range(2):
        known = [str(address) for node in nodes for address in node.get_visible_maddrs()]
        nodes.append(shut_down_at_end(hivemind.DHT(start=True, initial_peers=known, host_maddrs=[LOOPBACK])))
        averager = LeanGradientAverager(
            [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in given[number]],
            dht=nodes[-1],
            reuse_grad_buffers=True,
            prefix="honest",
            start=True,
            compression=Float16Compression(),
            min_matchmaking_time=1.5,
            request_timeout=1.0,
            allreduce_timeout=30.0,
            next_chunk_timeout=12.0,
            min_vector_size=1000,
            part_size_bytes=PART_BYTES,
        )
        averagers.append(shut_down_at_end(averager))
    rounds = [[], []]
    for _ in range(6):  # on a busy machine they may miss each other
        steps = []
        for averager, gradients in zip(averagers, given, strict=True):
            for parameter, gradient in zip(averager.parameters, gradients, strict=True):
                parameter.grad.copy_(gradient)
            averager.accumulate_grads_(8)
            steps.append(averager.step(wait=False, timeout=25, allow_retries=False))
        for step in steps:
            with contextlib.suppress(Exception):
                step.result(60)
        time.sleep(0.5)  # the report may come a moment later than the result
        for reported, averager in zip(rounds, averagers, strict=True):
            reported.extend(one for one in averager.finished_rounds() if one.num_peers == 2)
        if min(map(len, rounds)) >= 3:
            break
    assert all(one.complete and not one.reasons for reported in rounds for one in reported), rounds
    assert min(map(len, rounds)) >= 3, rounds


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("group", GROUPS)
def test_no_honest_newcomer_is_refused_and_none_refuses(pools, group, seed):
    """The first of a group has no memory in any round, and goes by its own few samples alone."""
    for kinds in (GROUPS[group], tuple(reversed(GROUPS[group]))):
        assert refusals(pools, kinds, rounds=ROUNDS, seed=seed, newcomer=True) == []
