"""The swarm's bulletin board: start a DHT node, sign and check what is stored there, exchange metrics."""

import asyncio
import contextlib
import hashlib
import logging
import math
import re
import resource
import tempfile
from collections.abc import Awaitable, Iterator
from functools import partial
from pathlib import Path

import hivemind
import pydantic.v1 as pydantic  # hivemind validates records with pydantic's first interface
from hivemind.dht import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.dht.schema import BytesWithPublicKey, SchemaValidator
from hivemind.optim.progress_tracker import LocalTrainingProgress
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils import MPFuture, get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from arguments import PeerArguments
from src.access.gate import MemberAuthorizer
from src.access.keys import write_key
from src.access.membership import EXPIRE_SECONDS, Identity, MembershipKeeper, read_identity
from src.access.ownership import MAX_LIFETIME, OwnedRecords, name_of, names_in
from src.access.record_limits import Acquaintances, know
from src.metrics.records import printable
from src.process.sockets import socket_directory
from src.process.watchdog import START_SECONDS, watch, watch_daemon
from src.swarm import hivemind_fixes
from src.swarm.clock import keep_time
from src.swarm.probe import MAX_ASKED, offer_probe
from src.swarm.progress import REPORT_SECONDS
from src.swarm.reach import Reach, ask_all, nearness
from src.swarm.run_files import offer_run_files

logger = logging.getLogger(__name__)

MAX_REASON_LENGTH = 200
# Leaving takes tenths of a second. What does not answer, of progress, parameters, gradients and the node itself, is
# waited for so long each: with the supervisor's CLEANER_SECONDS, a peer is gone within the 10 seconds of a promise.
LEAVE_SECONDS = 1.5
DAEMON_END_SECONDS = 0.2  # for p2pd, after it has said why it does not start
# For a look into the DHT, which asks many peers, or for what this peer asks of some, on a machine that is busy with
# other things; seconds are usual. Whatever takes longer has got lost.
LONGEST_ANSWER = 180.0


class TrainerMetrics(pydantic.BaseModel):
    """What a trainer reports when it finishes an epoch; before its first one, zeros that say that it is there.

    Losses are sums over ``mini_steps`` forward passes. ``total_samples`` counts from the trainer's start, so that the
    shares of the work are right although nobody sees every report; so does ``lone_epochs``: those that it stepped with
    its own gradients alone although others trained; so does ``computing``: the share of its time in which it did not
    wait for the swarm, and the bytes of all its rounds. ``failure`` is why its last failed round failed.
    """

    epoch: pydantic.conint(ge=0, strict=True)
    samples_per_second: pydantic.confloat(ge=0.0, strict=True) = 0.0
    samples: pydantic.conint(ge=0, strict=True) = 0
    loss: pydantic.confloat(strict=True) = 0.0
    mlm_loss: pydantic.confloat(strict=True) = 0.0
    sop_loss: pydantic.confloat(strict=True) = 0.0
    mini_steps: pydantic.conint(ge=0, strict=True) = 0
    failed_rounds: pydantic.conint(ge=0, strict=True) = 0
    total_samples: pydantic.conint(ge=0, strict=True) = 0
    lone_epochs: pydantic.conint(ge=0, strict=True) = 0
    computing: pydantic.confloat(ge=0.0, le=1.0, strict=True) | None = None
    bytes_sent: pydantic.conint(ge=0, strict=True) = 0
    bytes_received: pydantic.conint(ge=0, strict=True) = 0
    failure: pydantic.constr(max_length=MAX_REASON_LENGTH, strict=True) = ""

    @pydantic.validator("loss", "mlm_loss", "sop_loss", "samples_per_second")
    def _finite(cls, value):
        if not math.isfinite(value):
            raise ValueError("must be finite")
        return value


class MetricsSchema(pydantic.BaseModel):
    """One record a trainer, stored under its public key, so that nobody can write for another."""

    metrics: dict[BytesWithPublicKey, TrainerMetrics]


class StoredCheckpoint(pydantic.BaseModel):
    """What an auxiliary peer that stores checkpoints says as long as it lives: the epoch of its newest one, or 0."""

    epoch: pydantic.conint(ge=0, strict=True)


class CheckpointSchema(pydantic.BaseModel):
    """One record for each such peer, stored under its public key, as with metrics."""

    checkpoints: dict[BytesWithPublicKey, StoredCheckpoint]


class WatchedDHT(hivemind.DHT):
    """hivemind's node in a process of its own, which this peer's watchdog watches, and which answers in time.

    hivemind 1.1.12 waits for the answer for ever (dht/dht.py, `get`, `store` and `run_coroutine`), so that one question
    to the network that gets lost would stop a trainer. Here nothing is found then, or stored, or there is an error.
    """

    WHAT = "the DHT process"

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        self.start()
        watch(self.WHAT, self.pid)
        if await_ready:
            self.wait_until_ready(timeout)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        super().wait_until_ready(START_SECONDS if timeout is None else timeout)
        watch(self.WHAT, self.pid, partial(self.run_coroutine, _answer))
        watch_daemon(self.pid)

    def get(self, *args, return_future: bool = False, **kwargs):
        future = super().get(*args, return_future=True, **kwargs)
        return future if return_future else self._wait(future)

    def store(self, *args, return_future: bool = False, **kwargs):
        future = super().store(*args, return_future=True, **kwargs)
        return future if return_future else self._wait(future)

    def run_coroutine(self, coro, return_future: bool = False):
        future = super().run_coroutine(coro, return_future=True)
        return future if return_future else self._wait(future)

    @staticmethod
    def _wait(future: MPFuture):
        try:
            return future.result(2 * LONGEST_ANSWER)
        except TimeoutError as error:  # the node's own, or that it gives no sign of life
            raise TimeoutError(
                str(error) or f"the DHT process has been silent for {2 * LONGEST_ANSWER:.0f} s"
            ) from error

    # -- in the node's process

    async def _get(self, key, latest: bool, future: MPFuture, **kwargs) -> None:
        await _in_time(super()._get(key, latest, future, **kwargs), lambda: future.set_result(None), future)

    async def _store(self, key, value, expiration_time, subkey, future: MPFuture, **kwargs) -> None:
        work = super()._store(key, value, expiration_time, subkey, future, **kwargs)
        await _in_time(work, lambda: future.set_result(False), future)

    async def _run_coroutine(self, coro, future: MPFuture) -> None:
        error = TimeoutError(f"the DHT had no answer within {LONGEST_ANSWER:.0f} s")
        await _in_time(super()._run_coroutine(coro, future), lambda: future.set_exception(error), future)


async def _in_time(work: Awaitable, give_up, future: MPFuture) -> None:
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the future has it
    await asyncio.wait([task], timeout=LONGEST_ANSWER)
    if not task.done():
        logger.warning("the DHT had no answer within %.0f s", LONGEST_ANSWER)
        if not future.done():
            give_up()
        task.cancel()


async def _answer(_dht: hivemind.DHT, _node) -> None:
    """Nothing: this is how the watchdog asks whether the process answers."""


def short_peer_name(public_key: bytes) -> str:
    """The eight hexadecimal digits by which people tell a trainer from others; nobody can take another one's."""
    return hashlib.sha256(public_key).hexdigest()[:8]


def raise_open_file_limit(wanted: int = 16_384) -> None:
    """Each connection and shared tensor is an open file; the usual limit of 1024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def start_dht(
    peer: PeerArguments, identity: Identity | None = None, *, is_new: bool = True
) -> tuple[hivemind.DHT, bytes]:
    """Join the swarm, or begin one if ``initial_peers`` is empty. Returns the node and the subkey of its records.

    That names the key that signs them. It is the node's identity, too: nobody can have the one without the other.
    In a private run, only members get an answer from the node, and it publishes this peer's token from now on.
    ``is_new``: nobody has looked yet whether another peer has this identity, see `find_reach`.
    Raises ValueError with one line on what to do: a bad address, an unreachable peer, a port that is taken.
    """
    _prepare(peer)
    identity = identity if identity is not None else read_identity(peer)
    acquaintances = Acquaintances(PeerID.from_base58(name).to_bytes() for name in names_in(peer.initial_peers))
    membership = identity.membership
    is_revoked = (lambda owner: False) if membership is None else membership.is_revoked
    records = OwnedRecords(identity.private_key, peer.run_id, acquaintances, is_revoked)
    acquaintances.befriend([records.peer_id])
    know(acquaintances, peer.run_id)  # before the node's process is forked
    with _explained(peer), _identity_file(peer, identity) as options:
        dht = WatchedDHT(
            start=True,
            initial_peers=peer.initial_peers,
            client_mode=peer.is_client,
            **_where_to_listen(peer),
            use_ipfs=peer.use_ipfs,
            use_relay=False,  # who cannot be called is a client; a relay would be open to strangers, too
            shutdown_timeout=LEAVE_SECONDS,
            record_validators=[
                SchemaValidator(MetricsSchema, prefix=peer.run_id),
                SchemaValidator(CheckpointSchema, prefix=peer.run_id),
                records,
            ],
            authorizer=None if membership is None else MemberAuthorizer(membership),
            **(options if is_new else {**options, "check_if_identity_free": False}),
        )
    if membership is not None:
        keeper = MembershipKeeper(membership, dht, records.local_public_key)
        keeper.update()  # before anybody is asked to average with this peer
        keeper.start()
    dht.run_coroutine(offer_probe)
    dht.run_coroutine(offer_run_files)
    return dht, records.local_public_key


def _prepare(peer: PeerArguments) -> None:
    """What comes before any node, also of another process, is started. Raises ValueError for a bad address."""
    for flag in ("initial_peers", "host_maddrs", "announce_maddrs"):
        for address in getattr(peer, flag):
            _check_address(flag, address, needs_peer_id=flag == "initial_peers" and not peer.use_ipfs)
    raise_open_file_limit()
    hivemind_fixes.apply()
    keep_time()
    P2P._UNIX_SOCKET_PREFIX = f"/unix{socket_directory()}/"  # hivemind's own is /unix/tmp/hivemind-


def _where_to_listen(peer: PeerArguments) -> dict:
    """Options of p2pd: whoever cannot be reached tells nobody an address."""
    if peer.is_client:
        return {"no_listen": True}
    return {"host_maddrs": peer.host_maddrs, "announce_maddrs": peer.announce_maddrs or None}


@contextlib.contextmanager
def _explained(peer: PeerArguments) -> Iterator[None]:
    """What hivemind says of a node that does not start, as one line on what to do."""
    try:
        yield
    except TimeoutError as error:
        raise ValueError(f"--initial_peers: the network had no answer within {LONGEST_ANSWER:.0f} s") from error
    except (P2PDaemonError, ValidationError, RuntimeError) as error:
        raise ValueError(_explain(str(error), peer)) from error


def find_reach(peer: PeerArguments, identity: Identity) -> Reach:
    """Let the initial peers knock at this peer, before it becomes part of the run; see `src.swarm.reach`.

    That takes a node that nobody calls, in this process: the one that stays is started when it is known how. Raises
    ValueError as `start_dht` does.
    """
    _prepare(peer)
    membership = identity.membership
    records = OwnedRecords(identity.private_key, peer.run_id)

    async def find(options: dict) -> Reach:
        way_in = {"use_ipfs": True} if peer.use_ipfs else {"initial_peers": peer.initial_peers}
        try:
            p2p = await P2P.create(**way_in, dht_mode="client", use_relay=False, **_where_to_listen(peer), **options)
        except P2PDaemonError:
            await asyncio.sleep(DAEMON_END_SECONDS)  # the loop that has started a process sees its end, or complains
            raise
        try:
            node = await DHTNode.create(
                p2p,
                initial_peers=peer.initial_peers,
                client_mode=True,
                record_validator=records,
                authorizer=None if membership is None else MemberAuthorizer(membership),
            )
            if membership is not None:  # whoever is to knock asks for it
                until = get_dht_time() + EXPIRE_SECONDS
                await node.store(membership.members_key, membership.record(), until, subkey=records.local_public_key)
            return await ask_all(node, names_in(peer.initial_peers)[:MAX_ASKED], peer.announce_maddrs)
        finally:
            await p2p.shutdown()

    with _explained(peer), _identity_file(peer, identity) as options:
        return asyncio.run(asyncio.wait_for(find(options), LONGEST_ANSWER))


@contextlib.contextmanager
def _identity_file(peer: PeerArguments, identity: Identity) -> Iterator[dict]:
    """Options that name a file with this peer's key: p2pd reads it when it starts, and has no other way to get it."""
    if peer.identity_path is not None:
        yield {"identity_path": str(Path(peer.identity_path).expanduser())}
        return
    with tempfile.TemporaryDirectory(dir=socket_directory()) as folder:  # nobody else may enter it
        path = Path(folder) / "identity.key"
        write_key(path, identity.private_key)
        # hivemind would first start another daemon, to see whether somebody else has this key
        yield {"identity_path": str(path), "check_if_identity_free": False}


def _check_address(flag: str, address: str, *, needs_peer_id: bool) -> None:
    try:
        protocols = [protocol.name for protocol in Multiaddr(address).protocols()]
    except Exception as error:
        example = "/ip4/203.0.113.5/tcp/31337/p2p/Qm..." if needs_peer_id else "/ip4/0.0.0.0/tcp/31337"
        raise ValueError(f"--{flag}: {address!r} is not a multiaddress; one looks like {example}") from error
    if needs_peer_id and "p2p" not in protocols:
        raise ValueError(
            f"--{flag}: {address!r} lacks the peer's id; it must end in /p2p/Qm..., as that peer prints it"
        )


def _explain(error: str, peer: PeerArguments) -> str:
    if "address already in use" in error:
        return f"--host_maddrs: {' '.join(peer.host_maddrs)} is taken by another program; choose another port"
    if "cannot assign requested address" in error:
        return (
            f"--host_maddrs: {' '.join(peer.host_maddrs)} is not one of this machine; listen on /ip4/0.0.0.0/... "
            "and name the address that others see in --announce_maddrs"
        )
    if peer.identity_path is not None and "cannot parse invalid wire-format" in error:
        return (
            f"--identity_path: {peer.identity_path} does not hold a private key; restore it from a copy, or move "
            "it away: a new one is made, and this peer's address changes"
        )
    if "failed to connect to bootstrap peers" in error:
        return (
            f"--initial_peers: cannot reach {' '.join(peer.initial_peers)}; check that this peer runs, that the "
            "address is the one it prints, and that its port is open"
        )
    if "local time must be within" in error:
        own, other = map(float, re.findall(r"\d{9,}\.\d+", error)[:2])
        return (
            f"this machine's clock is {abs(other - own):.0f} s {'behind' if other > own else 'ahead of'} that of "
            f"{' '.join(peer.initial_peers)}; set it (`timedatectl set-ntp true`), or have the other side set its own"
        )
    if "can't access this node" in error:
        return (
            f"{' '.join(peer.initial_peers)} cannot connect back to this peer; open the port of --host_maddrs in the "
            "firewall and forward it in the router, or pass --client_mode"
        )
    if "none of the initial_peers responded" in error:
        return (
            f"--initial_peers: {' '.join(peer.initial_peers)} can be reached, but does not answer; check its id, that "
            "it belongs to this run, and that it lets this peer in"
        )
    if "is already taken by another peer" in error:
        return f"--identity_path {peer.identity_path}: a running peer of this run has this identity; each needs its own"
    return f"cannot start the peer-to-peer daemon: {printable(error.strip().splitlines()[-1])}"


def visible_addresses(dht: hivemind.DHT) -> list[str]:
    """Addresses at which this peer listens: public ones first, loopback ones last; none of a client."""
    try:
        return sorted((str(address) for address in dht.get_visible_maddrs(latest=True)), key=nearness)
    except ValueError:  # hivemind's, for no address
        return []


def addresses_for_others(dht: hivemind.DHT, peer: PeerArguments) -> list[str]:
    """What others can use as ``--initial_peers``: of a client, what it uses itself.

    Of the others, those that reach furthest: who has a public address is found there from everywhere, and who has none
    may still be found in its own network, or on this machine.
    """
    if peer.is_client:
        return peer.initial_peers
    addresses = visible_addresses(dht)
    return [address for address in addresses if nearness(address) == nearness(addresses[0])]


def store_metrics(
    dht: hivemind.DHT, run_id: str, public_key: bytes, metrics: TrainerMetrics, expiration: float
) -> None:
    """Publish a trainer's metrics for ``expiration`` seconds, in the background."""
    _store(dht, f"{run_id}_metrics", public_key, metrics, expiration)


def fetch_metrics(dht: hivemind.DHT, run_id: str) -> dict[bytes, TrainerMetrics]:
    """The newest metrics of all trainers by public key; records that are not valid are left out."""
    return _fetch(dht, f"{run_id}_metrics", TrainerMetrics)


def store_checkpoint_epoch(dht: hivemind.DHT, run_id: str, public_key: bytes, epoch: int, expiration: float) -> None:
    """Publish, for ``expiration`` seconds and in the background, that this peer stores checkpoints: up to ``epoch``."""
    _store(dht, f"{run_id}_checkpoints", public_key, StoredCheckpoint(epoch=epoch), expiration)


def fetch_checkpoint_epochs(dht: hivemind.DHT, run_id: str) -> dict[bytes, int]:
    """The newest stored epoch of each peer that stores checkpoints and lives, by public key."""
    return {key: stored.epoch for key, stored in _fetch(dht, f"{run_id}_checkpoints", StoredCheckpoint).items()}


def _store(dht: hivemind.DHT, key: str, public_key: bytes, record: pydantic.BaseModel, expiration: float) -> None:
    dht.store(
        key=key,
        subkey=public_key,
        value=record.dict(),
        expiration_time=get_dht_time() + min(expiration, MAX_LIFETIME),
        return_future=True,
    )


def _fetch(dht: hivemind.DHT, key: str, kind: type[pydantic.BaseModel]) -> dict[bytes, pydantic.BaseModel]:
    found = dht.get(key, latest=True)
    records = {}
    if found is None or not isinstance(found.value, dict):
        return records
    for public_key, entry in found.value.items():
        try:
            records[public_key] = kind.parse_obj(entry.value)
        except pydantic.ValidationError as error:
            logger.debug("ignored a malformed record of %s in %s: %s", name_of(public_key), key, error)
    return records


def fetch_progress(dht: hivemind.DHT, run_id: str) -> dict[str, LocalTrainingProgress]:
    """What the trainers report within an epoch, several times in it, by short name; ``time``: of the last report."""
    record = dht.get(f"{run_id}_progress", latest=True)
    progress = {}
    if record is None or not isinstance(record.value, dict):
        return progress
    for public_key, entry in record.value.items():
        try:
            record = LocalTrainingProgress.parse_obj(entry.value)
            # its time is that of the last batch, which may take minutes; a report is renewed meanwhile
            record.time = max(record.time, entry.expiration_time - REPORT_SECONDS)
            if not math.isfinite(record.time) or not math.isfinite(record.samples_per_second):
                continue
            progress[short_peer_name(public_key)] = record
        except pydantic.ValidationError as error:
            logger.debug("ignored a malformed progress record: %s", error.errors()[0]["msg"])
    return progress
