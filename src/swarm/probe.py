"""What peers answer so that others can test their connection: bytes to time, and a knock on the caller's own port.

Each peer offers it from its DHT process. The answers are bounded, so that strangers cannot take more than their share;
in a private run, only members get any, and only they are asked.
"""

import asyncio
import contextlib
import json
import logging
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import AsyncIterator  # noqa: UP035, hivemind tells a stream by this type, not by that of collections.abc

from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto import dht_pb2
from hivemind.proto.runtime_pb2 import Tensor
from hivemind.utils import get_dht_time

from src.access.gate import Gated, MemberAuthorizer, MemberGate
from src.access.ownership import names_in
from src.metrics.records import printable

logger = logging.getLogger(__name__)

CHUNK_BYTES, MAX_BYTES, MAX_SECONDS = 2**18, 2**26, 4.0
SILENT_SECONDS, LONGEST_CALL = 8.0, 10 * MAX_SECONDS  # a chunk takes so long at 0.25 Mbit/s
BYTES_AN_HOUR = 2**31  # for all callers together
KNOCK_SECONDS, MAX_PORTS, MAX_WORDS = 3.0, 4, 60
GREETING = b"/multistream/"  # the first thing a libp2p daemon says
PING_SECONDS = 10.0
ANSWER_SECONDS, MAX_ASKED = 3.0, 8  # for a few bytes; of how many peers at once
MAX_PINGED = 64
MAX_ANSWER_BYTES, MAX_AGE_SECONDS = 4096, 86_400.0


@dataclass(frozen=True)
class Knock:
    """A TCP connection that was tried: ``open`` and what answered, or why not."""

    host: str
    port: int
    open: bool
    is_peer: bool = False
    seconds: float = 0.0
    error: str = ""


async def knock(host: str, port: int, *, timeout: float = KNOCK_SECONDS) -> Knock:
    """Connect, see who answers, hang up. ``error`` is refused, timeout, unknown host, or the system's words."""
    started, writer = time.perf_counter(), None
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout)
        seconds = time.perf_counter() - started
        try:
            greeting = await asyncio.wait_for(reader.read(64), timeout)
        except (TimeoutError, OSError):
            greeting = b""
        return Knock(host, port, True, GREETING in greeting, seconds)
    except TimeoutError:
        error = "timeout"
    except ConnectionRefusedError:
        error = "refused"
    except socket.gaierror:
        error = "unknown host"
    except OSError as trouble:
        error = trouble.strerror or str(trouble)
    finally:
        if writer is not None:
            writer.close()
    return Knock(host, port, False, error=error)


class ConnectionProbe(Gated, ServicerBase):
    """The answering side. Its name is part of the protocol."""

    def __init__(self, p2p):
        self.p2p, self.spent, self.hour, self.busy = p2p, 0, 0, asyncio.Lock()
        self.known_epoch: tuple[int, float] | None = None  # the swarm's, and when (`time.monotonic`) this peer knew it

    def _spend(self, count: int) -> bool:
        """Whether so many bytes may still be exchanged in this hour."""
        hour = int(time.monotonic() // 3600)
        if hour != self.hour:
            self.hour, self.spent = hour, 0
        self.spent += count
        return self.spent <= BYTES_AN_HOUR

    @contextlib.asynccontextmanager
    async def _turn(self):
        """One caller at a time, so that they do not slow each other down; but nobody waits longer than a measurement
        takes: whoever holds the turn for longer sends and receives nothing."""
        try:
            await asyncio.wait_for(self.busy.acquire(), MAX_SECONDS)
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            self.busy.release()

    async def rpc_send(self, request: Tensor, context: P2PContext) -> AsyncIterator[Tensor]:
        """Send zeros for as long and as much as is allowed; one caller at a time."""
        if not await self._admits(context.remote_id):
            return
        async with self._turn():
            chunk, sent, give_up_at = Tensor(buffer=bytes(CHUNK_BYTES)), 0, time.monotonic() + MAX_SECONDS
            while sent < MAX_BYTES and time.monotonic() < give_up_at and self._spend(CHUNK_BYTES):
                sent += CHUNK_BYTES
                yield chunk

    async def rpc_receive(self, request: AsyncIterator[Tensor], context: P2PContext) -> Tensor:
        """Count what the caller sends, as much as is allowed."""
        received, give_up_at = 0, time.monotonic() + LONGEST_CALL
        if not await self._admits(context.remote_id):
            return Tensor(buffer=b"0")
        async with self._turn():
            with contextlib.suppress(TimeoutError, StopAsyncIteration):
                while received < MAX_BYTES:
                    seconds = min(SILENT_SECONDS, give_up_at - time.monotonic())
                    message = await asyncio.wait_for(anext(request), seconds)
                    received += len(message.buffer)
                    if not self._spend(len(message.buffer)):
                        break
        return Tensor(buffer=str(received).encode())

    async def rpc_epoch(self, request: Tensor, context: P2PContext) -> Tensor:
        """Where the swarm is, as far as this peer knows at first hand: [epoch, seconds ago], or nothing."""
        if self.known_epoch is None or not await self._admits(context.remote_id):
            return Tensor()
        epoch, when = self.known_epoch
        return Tensor(buffer=json.dumps([epoch, time.monotonic() - when]).encode())

    async def rpc_knock(self, request: Tensor, context: P2PContext) -> Tensor:
        """Try ports of the caller, at the addresses from which this peer sees it and nowhere else."""
        if not await self._admits(context.remote_id) or not self._spend(2**20):
            return Tensor(buffer=b"[]")
        ports = [port for port in json.loads(request.buffer) if isinstance(port, int) and 0 < port < 65536]
        hosts = {address_of(str(address))[0] for info in await self.p2p.list_peers()
                 if info.peer_id == context.remote_id for address in info.addrs} - {None}  # fmt: skip
        tried = [await knock(host, port) for host in sorted(hosts)[:2] for port in ports[:MAX_PORTS]]
        return Tensor(buffer=json.dumps([vars(one) for one in tried]).encode())


def address_of(multiaddress: str) -> tuple[str | None, int | None]:
    """Host and TCP port of a multiaddress, None where it has none (UDP, relayed)."""
    words = multiaddress.strip("/").split("/")
    if "p2p-circuit" in words or len(words) < 4 or words[2] != "tcp":
        return None, None
    return (words[1], int(words[3])) if words[0] in ("ip4", "ip6", "dns", "dns4", "dns6") else (None, None)


async def offer_probe(dht, node) -> None:
    """For `DHT.run_coroutine`: answer the probes of others from now on."""
    authorizer = node.protocol.authorizer
    if isinstance(authorizer, MemberAuthorizer):

        def report(peer: PeerID, objection: str) -> None:
            logger.info("did not measure with %s: it %s", peer, objection)

        ConnectionProbe._gate = MemberGate(authorizer.membership, partial(node.get, latest=True), report)
    node.probe = ConnectionProbe(node.p2p)
    await node.probe.add_p2p_handlers(node.p2p)


@dataclass(frozen=True)
class Ping:
    """Round trip in seconds, and how far the peer's clock is ahead of this one's."""

    seconds: float
    clock_offset: float


async def _ping(dht, node, *, peer_id: str, count: int = 3) -> Ping | None:
    best = None
    for _ in range(count):
        sent, started = get_dht_time(), time.perf_counter()
        try:
            answer = await node.protocol.get_stub(PeerID.from_base58(peer_id)).rpc_ping(
                dht_pb2.PingRequest(peer=node.protocol.node_info), timeout=PING_SECONDS
            )
        except Exception as error:  # P2P errors of many kinds: the peer is not there
            logger.debug("no answer to a ping: %r", error)
            return best
        seconds = time.perf_counter() - started
        if not math.isfinite(answer.dht_time):
            return best
        if best is None or seconds < best.seconds:
            best = Ping(seconds, answer.dht_time - (sent + seconds / 2))
    return best


def ping(dht, peer_id: str) -> Ping | None:
    """The best of three round trips to a peer, or None if it does not answer."""
    return dht.run_coroutine(partial(_ping, peer_id=peer_id))


async def _reachable(dht, node, *, peer_ids: Sequence[str]) -> set[str]:
    async def answers(peer_id: str) -> bool:
        try:
            stub = node.protocol.get_stub(PeerID.from_base58(peer_id))
            await stub.rpc_ping(dht_pb2.PingRequest(), timeout=ANSWER_SECONDS)
        except Exception as error:
            logger.debug("%s cannot be reached: %r", peer_id, error)
            return False
        return True

    answered = await asyncio.gather(*map(answers, peer_ids))
    return {peer for peer, there in zip(peer_ids, answered, strict=True) if there}


def reachable(dht, peer_ids: Sequence[str]) -> set[str]:
    """Those of some peers who answer this one; of very many, some."""
    return dht.run_coroutine(partial(_reachable, peer_ids=peer_ids[:MAX_PINGED])) if peer_ids else set()


def _knock_of(answer: dict) -> Knock:
    """What another peer says of a port; raises an error if it makes no sense."""
    host, error = (printable(answer[name], MAX_WORDS) for name in ("host", "error"))
    return Knock(host, int(answer["port"]), answer["open"] is True, answer["is_peer"] is True,
                 float(answer["seconds"]), error)  # fmt: skip


async def request_knocks(node, peer_id: str, ports: Sequence[int]) -> list[Knock] | None:
    """As `ask_to_knock`, where the node lives."""
    stub = ConnectionProbe.get_stub(node.p2p, PeerID.from_base58(peer_id))
    wait = 2 * MAX_PORTS * 2 * KNOCK_SECONDS
    try:
        answer = await stub.rpc_knock(Tensor(buffer=json.dumps(list(ports)).encode()), timeout=wait)
        return [_knock_of(one) for one in json.loads(answer.buffer)[: 2 * MAX_PORTS]]
    except Exception as error:  # whatever a stranger answers
        logger.debug("no answer to a request to knock: %r", error)
        return None


async def _ask_to_knock(dht, node, *, peer_id: str, ports: Sequence[int]) -> list[Knock] | None:
    return await request_knocks(node, peer_id, ports)


def ask_to_knock(dht, peer_id: str, ports: Sequence[int]) -> list[Knock] | None:
    """Let a peer try this machine's ports from outside; None if it cannot say."""
    return dht.run_coroutine(partial(_ask_to_knock, peer_id=peer_id, ports=ports))


@dataclass(frozen=True)
class Speed:
    """Mbit/s to and from one peer; that peer's own connection may be the narrower one."""

    download: float
    upload: float

    @property
    def bandwidth(self) -> float:
        return min(self.download, self.upload)


async def _measure_speed(dht, node, *, peer_id: str) -> Speed | None:
    stub = ConnectionProbe.get_stub(node.p2p, PeerID.from_base58(peer_id))

    async def chunks():
        chunk, give_up_at = Tensor(buffer=bytes(CHUNK_BYTES)), time.monotonic() + MAX_SECONDS
        for _ in range(MAX_BYTES // CHUNK_BYTES):
            yield chunk
            if time.monotonic() > give_up_at:
                break

    async def download() -> float:
        received, started = 0, time.perf_counter()
        async for message in await stub.rpc_send(Tensor()):
            received += len(message.buffer)
        return received / (time.perf_counter() - started)

    async def upload() -> float:
        started = time.perf_counter()
        answer = await stub.rpc_receive(chunks())
        return min(int(answer.buffer), MAX_BYTES) / (time.perf_counter() - started)

    try:
        down = await asyncio.wait_for(download(), 10 * MAX_SECONDS)
        up = await asyncio.wait_for(upload(), 10 * MAX_SECONDS)
    except Exception as error:  # whatever a stranger answers
        logger.debug("no measurement: %r", error)
        return None
    return Speed(down * 8e-6, up * 8e-6) if min(down, up) > 0 else None


def measure_speed(dht, peer_id: str) -> Speed | None:
    """Time at most 64 MiB or four seconds of traffic in each direction; None if the peer does not answer."""
    return dht.run_coroutine(partial(_measure_speed, peer_id=peer_id))


def measure_bandwidth(dht, initial_peers: Sequence[str]) -> float:
    """What `--bandwidth auto` stands for: Mbit/s against the first initial peer that answers.

    Raises ValueError if there is none.
    """
    for address in initial_peers:
        speed = measure_speed(dht, address.rsplit("/p2p/", 1)[-1])
        if speed is not None:
            return round(speed.bandwidth, 1)
    raise ValueError(
        "--bandwidth auto: no initial peer answers, so there is nothing to measure against; pass a number of Mbit/s"
    )


async def _tell_epoch(dht, node, *, known: tuple[int, float] | None) -> None:
    if hasattr(node, "probe"):
        node.probe.known_epoch = None if known is None else (known[0], time.monotonic() - known[1])


def tell_epoch(dht, known: tuple[int, float] | None) -> None:
    """Answer whoever asks from now on that the swarm was in an epoch so many seconds ago, or that nothing is known."""
    dht.run_coroutine(partial(_tell_epoch, known=known), return_future=True)


async def _ask_epoch(dht, node, *, peer_ids: Sequence[str]) -> list[tuple[int, float]]:
    async def ask(peer_id: str) -> tuple[int, float] | None:
        try:
            stub = ConnectionProbe.get_stub(node.p2p, PeerID.from_base58(peer_id))
            answer = await asyncio.wait_for(stub.rpc_epoch(Tensor()), ANSWER_SECONDS)
            epoch, age = json.loads(answer.buffer[:MAX_ANSWER_BYTES]) if answer.buffer else (None, None)
        except Exception as error:  # it is not there, or whatever it answers
            logger.debug("no epoch from %s: %r", peer_id, error)
            return None
        fits = type(epoch) is int and 0 <= epoch < 2**53 and type(age) is float and 0 <= age < MAX_AGE_SECONDS
        return (epoch, age) if fits else None

    answers = await asyncio.gather(*(ask(peer) for peer in peer_ids if peer != node.peer_id.to_base58()))
    return [answer for answer in answers if answer is not None]


def ask_epoch(dht, addresses: Sequence[str]) -> tuple[int, float] | None:
    """Where the swarm is, (epoch, seconds ago), according to the peers at addresses that this peer was started with.

    Their ids are in the addresses, so that nobody else can answer for them. The middle answer counts, so that one of
    several that is wrong does not matter; None if none of them knows.
    """
    peer_ids = names_in(addresses)
    if not peer_ids:
        return None
    try:
        future = dht.run_coroutine(partial(_ask_epoch, peer_ids=peer_ids[:MAX_ASKED]), return_future=True)
        answers = sorted(future.result(2 * ANSWER_SECONDS))
    except Exception as error:  # the DHT may be about to end
        logger.debug("could not ask for the epoch: %r", error)
        return None
    return answers[len(answers) // 2] if answers else None
