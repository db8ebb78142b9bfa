"""libp2p's relays, tried: they make a peer behind a router reachable, at twice the bytes for the member that relays.

So nobody uses them by default: a reducer that others can call takes each byte of a client once, and a relay would take
it twice, to hand it to another client, whose line is the slower one. See docs/join.md.
"""

import asyncio
import ctypes
import multiprocessing
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc

import pytest
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.proto.runtime_pb2 import Tensor

from benchmarks import emulated_links
from benchmarks.emulated_links import Link, Network

pytestmark = [pytest.mark.slow, pytest.mark.swarm, pytest.mark.timeout(300)]
CHUNK, NUM_CHUNKS = 2**18, 20  # 5.2 MB
NUM_MEMBERS = 4  # libp2p waits for three minutes where it knows fewer that may relay


class Box(ServicerBase):
    async def rpc_take(self, request: AsyncIterator[Tensor], context: P2PContext) -> Tensor:
        """Count what comes."""
        count = 0
        async for message in request:
            count += len(message.buffer)
        return Tensor(buffer=str(count).encode())


def live(host, members: list[str], pipe) -> None:
    """In a process of its own, in the network of a host: tell what it is called, send to whom it is told."""
    with open(f"/var/run/netns/{host.namespace}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0

    async def run() -> None:
        role = {"force_reachability": "public"}
        if host.link.nat:
            role = {"force_reachability": "private", "use_auto_relay": True, "trusted_relays": members}
        where = [f"/ip4/{host.address}/tcp/4000"]
        p2p = await P2P.create(initial_peers=members, host_maddrs=where, startup_timeout=60, **role)
        await Box().add_p2p_handlers(p2p)
        addresses = []
        for _ in range(60 if host.link.nat else 1):
            addresses = [str(address) for address in await p2p.get_visible_maddrs(latest=True)]
            if any("p2p-circuit" in address for address in addresses):
                break
            await asyncio.sleep(1.0)
        pipe.send((p2p.peer_id.to_base58(), addresses))
        while (target := await asyncio.to_thread(pipe.recv)) != "end":
            await asyncio.to_thread(pipe.send, await send(p2p, target))
        await p2p.shutdown()

    async def send(p2p: P2P, target: str) -> int:
        async def chunks():
            for _ in range(NUM_CHUNKS):
                yield Tensor(buffer=bytes(CHUNK))

        answer = await asyncio.wait_for(Box.get_stub(p2p, PeerID.from_base58(target)).rpc_take(chunks()), 60)
        return int(answer.buffer)

    asyncio.run(run())


def test_relay_reaches_a_peer_behind_a_router_and_takes_each_byte_twice():
    reason = emulated_links.what_lacks()
    if reason:
        pytest.skip(f"links cannot be emulated: {reason}")
    forking, peers, members, ids = multiprocessing.get_context("fork"), [], [], {}
    with Network("45.77") as network:
        try:
            for name in (*(f"member{number}" for number in range(NUM_MEMBERS)), "anna", "boris"):
                host = network.add(name, Link(100, 20, nat=not name.startswith("member")))
                pipe, other_end = forking.Pipe()
                process = forking.Process(target=live, args=(host, list(members), other_end))
                process.start()
                peers.append((process, pipe))
                assert pipe.poll(120), f"nothing from {name}"
                ids[name], addresses = pipe.recv()
                if host.link.nat:
                    assert any("p2p-circuit" in address for address in addresses), addresses
                else:
                    members += addresses[:1]
            before = network.traffic()
            boris = peers[-1][1]
            boris.send(ids["anna"])
            assert boris.poll(90), "no answer"
            assert boris.recv() == NUM_CHUNKS * CHUNK
            used = {name: after - before[name] for name, after in network.traffic().items()}
        finally:
            for process, pipe in peers:
                pipe.send("end")
                process.join(20)
                process.kill()
    relayed = max(range(NUM_MEMBERS), key=lambda number: used[f"member{number}"].up)
    sent = NUM_CHUNKS * CHUNK
    assert sent < used[f"member{relayed}"].down < 1.2 * sent and sent < used[f"member{relayed}"].up < 1.2 * sent
    assert used["boris"].up > sent and used["anna"].down > sent
