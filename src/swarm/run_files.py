"""How a run's settings and files travel: in pieces, from any peer that has them to one that joins.

Each peer offers them from its DHT process. The answers are bounded, so that strangers cannot take more than their
share; in a private run, only members get any, and only they are asked. What comes is believed in no other way than by
its hash: that of a file is in the manifest, and whose manifest counts says `take_up`.
"""

import asyncio
import json
import logging
import time
from functools import partial
from pathlib import Path

from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto.runtime_pb2 import Tensor

from src.access.gate import Gated
from src.metrics.records import printable
from src.settings.folder import MANIFEST, MAX_SIGNATURE_BYTES, SIGNATURE
from src.settings.manifest import MAX_BYTES, Manifest, sha256
from src.swarm.state_transfer import Allowance

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**17
# For all callers together: eight of the largest tokenizers at once, and so many bytes an hour.
BURST_BYTES, BYTES_AN_HOUR = 2**28, 2**31
MAX_REQUEST_BYTES = 200
PIECE, NOTHING, BUSY, STRANGER = "piece", "nothing", "busy", "stranger"  # what an answer says that it is
# A piece takes half a minute at 0.035 Mbit/s. Whoever sends less than so many bytes a second, or is busy for too long,
# is left for the next peer: it could not take part in averaging either.
PIECE_SECONDS, TRIES, LEAST_RATE = 30.0, 2, 8 * 2**10
WAIT_SECONDS, ASK_AGAIN_SECONDS = {BUSY: 120.0, STRANGER: 15.0}, 3.0  # a new member may not be known yet


class RunFiles(Gated, ServicerBase):
    """The answering side. Its name is part of the protocol."""

    def __init__(self):
        self.folder: Path | None = None  # as `src.settings.folder` writes it
        self.names: frozenset[str] | None = frozenset()  # None: it is not known yet
        self.bytes = Allowance(BURST_BYTES, BYTES_AN_HOUR / 3600)

    async def rpc_piece(self, request: Tensor, context: P2PContext) -> Tensor:
        """``request``: [name, offset]; so much of that file as fits into one answer, empty at its end."""
        if not await self._admits(context.remote_id):
            return Tensor(dtype=STRANGER)
        if self.names is None:
            return Tensor(dtype=BUSY)
        try:
            name, offset = json.loads(request.buffer[:MAX_REQUEST_BYTES])
            known = name in self.names and type(offset) is int and 0 <= offset < 2**40
        except (ValueError, TypeError, RecursionError):
            known = False
        if not known:
            return Tensor(dtype=NOTHING)
        if self.bytes.left <= 0:
            return Tensor(dtype=BUSY)
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(offset)
                piece = file.read(PIECE_BYTES)
        except OSError as error:  # somebody has removed it
            logger.debug("cannot hand over %s: %s", name, error)
            return Tensor(dtype=NOTHING)
        self.bytes.spend(len(piece) + 100)
        return Tensor(dtype=PIECE, buffer=piece)


async def offer_run_files(dht, node) -> None:
    """For `DHT.run_coroutine`, after `offer_probe`: answer whoever asks, at first that there is nothing."""
    RunFiles._gate = type(node.probe)._gate
    node.run_files = RunFiles()
    await node.run_files.add_p2p_handlers(node.p2p)


async def _hand_over(dht, node, *, folder: Path | None, names: frozenset[str] | None) -> None:
    node.run_files.folder, node.run_files.names = folder, names


def hand_over(dht, folder: Path, manifest: Manifest) -> None:
    """Let others have what is in the folder of a run from now on."""
    names = frozenset({MANIFEST, SIGNATURE, *manifest.files})
    dht.run_coroutine(partial(_hand_over, folder=folder.absolute(), names=names))


def let_others_wait(dht) -> None:
    """Until `hand_over` or `hand_over_nothing`."""
    dht.run_coroutine(partial(_hand_over, folder=None, names=None))


def hand_over_nothing(dht) -> None:
    dht.run_coroutine(partial(_hand_over, folder=None, names=frozenset()))


class NothingThereError(LookupError):
    """A peer has no settings to hand over, or is of a version that cannot."""


async def _ask(dht, node, *, peer_id: str, name: str, offset: int) -> tuple[str, bytes]:
    stub = RunFiles.get_stub(node.p2p, PeerID.from_base58(peer_id))
    for attempt in range(TRIES):
        try:
            answer = await asyncio.wait_for(
                stub.rpc_piece(Tensor(buffer=json.dumps([name, offset]).encode())), PIECE_SECONDS * (attempt + 1)
            )
            return answer.dtype, answer.buffer
        except TimeoutError:
            continue
        except Exception as error:  # P2P errors of many kinds
            if "not supported" in str(error):
                return NOTHING, b""
            return "error", str(error).encode()
    return "error", b"it does not answer"


def fetch(dht, peer_id: str, name: str, *, limit: int) -> bytes:
    """A file of a peer, of at most ``limit`` bytes.

    Raises NothingThereError if that peer has none, ConnectionError if it cannot be asked, and ValueError if it sends
    something else.
    """
    found, started, waited = b"", time.monotonic(), 0.0
    while True:
        kind, piece = dht.run_coroutine(partial(_ask, peer_id=peer_id, name=name, offset=len(found)))
        if waited < WAIT_SECONDS.get(kind, 0.0):
            time.sleep(ASK_AGAIN_SECONDS)
            waited += ASK_AGAIN_SECONDS
            continue
        if kind == NOTHING:
            raise NothingThereError(f"{name}: that peer has none")
        if kind != PIECE:
            reasons = {BUSY: "it is busy", STRANGER: "it does not let this peer in"}
            reason = reasons.get(kind) or printable(piece.decode(errors="replace"), 100)
            raise ConnectionError(f"{name} could not be fetched: {reason}")
        if len(piece) > PIECE_BYTES or len(found) + len(piece) > limit:
            raise ValueError(f"{name} is longer than the {limit} bytes that it may have")
        found += piece
        if not piece:
            return found
        seconds = time.monotonic() - started - waited
        if len(found) < LEAST_RATE * (seconds - TRIES * PIECE_SECONDS):
            raise ConnectionError(f"{name} came with {len(found) / seconds / 1000:.1f} KB/s")


def fetch_manifest(dht, peer_id: str) -> tuple[bytes, bytes]:
    """A peer's manifest, not checked yet, and its signature, which is empty if there is none. Raises as `fetch`."""
    content = fetch(dht, peer_id, MANIFEST, limit=MAX_BYTES)
    try:
        return content, fetch(dht, peer_id, SIGNATURE, limit=MAX_SIGNATURE_BYTES)
    except NothingThereError:
        return content, b""


def fetch_file(dht, peer_id: str, name: str, digest: str, size: int) -> bytes:
    """A file as the manifest names it. Raises ValueError if this peer does not have that, else as `fetch`."""
    try:
        content = fetch(dht, peer_id, name, limit=size)
    except NothingThereError as error:
        raise ValueError(f"it does not hand over its {name}") from error
    if sha256(content) != digest:
        raise ValueError(f"its {name} does not have the hash that its settings name")
    return content
