"""How settings travel: in pieces, within bounds on both sides, whatever the other one does."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto.runtime_pb2 import Tensor
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments
from src.access.membership import Identity
from src.settings.folder import MANIFEST, SIGNATURE, folder_of, write_folder
from src.settings.manifest import MAX_BYTES, make_files, sha256
from src.swarm import run_files as module
from src.swarm.dht import start_dht, visible_addresses
from src.swarm.run_files import NothingThereError, RunFiles, fetch, fetch_file, fetch_manifest, hand_over
from tests.settings.test_manifest import CONFIG, TOKENIZER, manifest_of_demo

PEER = PeerID.from_base58("QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC")
FILES = make_files(CONFIG, TOKENIZER)
PIPELINE = "tokenizer/tokenizer.json"


class FakeDHT:
    """Asks one peer, without a network: ``answer(request)`` is what it returns."""

    def __init__(self, answer, monkeypatch):
        async def rpc_piece(request):
            self.asked += 1
            return await answer(request)

        self.asked = 0
        monkeypatch.setattr(RunFiles, "get_stub", lambda p2p, peer: SimpleNamespace(rpc_piece=rpc_piece))
        monkeypatch.setattr(module, "ASK_AGAIN_SECONDS", 0.01)

    def run_coroutine(self, coroutine):
        return asyncio.run(coroutine(self, SimpleNamespace(p2p=None)))


def serving(folder, *, names=(MANIFEST, SIGNATURE, *FILES)) -> RunFiles:
    servicer = RunFiles()
    servicer.folder, servicer.names = folder, frozenset(names)
    return servicer


@pytest.fixture
def folder(tmp_path):
    path = folder_of(tmp_path, "run")
    write_folder(path, manifest_of_demo(), FILES, b"signed")
    return path


def asking(servicer, monkeypatch) -> FakeDHT:
    return FakeDHT(lambda request: servicer.rpc_piece(request, SimpleNamespace(remote_id=PEER)), monkeypatch)


def test_manifest_and_files_arrive_as_they_are(folder, monkeypatch):
    dht = asking(serving(folder), monkeypatch)
    assert fetch_manifest(dht, str(PEER)) == (manifest_of_demo().content(), b"signed")
    assert len(FILES[PIPELINE]) > 2 * module.PIECE_BYTES
    for name, (digest, size) in manifest_of_demo().files.items():
        assert fetch_file(dht, str(PEER), name, digest, size) == FILES[name]
    (folder / SIGNATURE).unlink()
    assert fetch_manifest(dht, str(PEER))[1] == b""


@pytest.mark.parametrize(
    "request_",
    [b"", b"[", b"[1, 2]", b'["run.json"]', b'["run.json", -1]', b'["run.json", "0"]', b'[["run.json"], 0]',
     b'["../run/run.json", 0]', b'["/etc/passwd", 0]', b'["run.json", 1e9]', b'["backup.pth", 0]', b"[" * 10**6,
     b'["run.json", 1' + b"0" * 5000 + b"]"],
)  # fmt: skip
def test_nothing_but_files_of_the_run_is_handed_over(folder, request_):
    answer = asyncio.run(serving(folder).rpc_piece(Tensor(buffer=request_), SimpleNamespace(remote_id=PEER)))
    assert (answer.dtype, answer.buffer) == (module.NOTHING, b"")


def test_who_has_nothing_or_is_older_is_told_from_who_fails(monkeypatch):
    async def older(request):
        raise P2PHandlerError("failed to negotiate protocol: protocols not supported: [RunFiles.rpc_piece]")

    async def broken(request):
        raise P2PHandlerError("dial backoff \x1b[2J\n")

    for dht in (FakeDHT(older, monkeypatch), asking(RunFiles(), monkeypatch)):
        with pytest.raises(NothingThereError):
            fetch_manifest(dht, str(PEER))
    with pytest.raises(ConnectionError, match=r"run.json could not be fetched: dial backoff \[2J$"):
        fetch_manifest(FakeDHT(broken, monkeypatch), str(PEER))


def test_endless_file_ends_at_its_size(monkeypatch):
    async def endless(request):
        return Tensor(dtype=module.PIECE, buffer=bytes(module.PIECE_BYTES))

    async def huge(request):
        return Tensor(dtype=module.PIECE, buffer=bytes(2**22))

    for answer in (endless, huge):
        dht = FakeDHT(answer, monkeypatch)
        with pytest.raises(ValueError, match="longer than the 65536 bytes"):
            fetch_manifest(dht, str(PEER))
        assert dht.asked == 1
    with pytest.raises(ValueError, match="longer than the 300000 bytes"):
        fetch_file(FakeDHT(endless, monkeypatch), str(PEER), PIPELINE, "0" * 64, 300_000)


def test_other_content_than_the_hash_says_is_refused(folder, monkeypatch):
    dht = asking(serving(folder), monkeypatch)
    with pytest.raises(ValueError, match=r"its config\.json does not have the hash"):
        fetch_file(dht, str(PEER), "config.json", sha256(b"other"), 2**16)
    with pytest.raises(ValueError, match=r"does not hand over its tokenizer/spiece\.model"):
        fetch_file(dht, str(PEER), "tokenizer/spiece.model", sha256(b"other"), 2**16)


def test_who_drips_or_is_silent_is_left(monkeypatch):
    async def drip(request):
        await asyncio.sleep(0.01)
        return Tensor(dtype=module.PIECE, buffer=b"x")

    async def silent(request):
        await asyncio.sleep(60)

    monkeypatch.setattr(module, "PIECE_SECONDS", 0.1)
    with pytest.raises(ConnectionError, match=r"came with 0.\d KB/s"):
        fetch(FakeDHT(drip, monkeypatch), str(PEER), MANIFEST, limit=MAX_BYTES)
    dht = FakeDHT(silent, monkeypatch)
    with pytest.raises(ConnectionError, match="does not answer"):
        fetch(dht, str(PEER), MANIFEST, limit=MAX_BYTES)
    assert dht.asked == module.TRIES


def test_budget_is_shared_by_all_and_who_waits_gets_the_file(folder, monkeypatch):
    servicer = serving(folder)
    servicer.bytes.spend(module.BURST_BYTES)
    dht = asking(servicer, monkeypatch)
    monkeypatch.setattr(module, "WAIT_SECONDS", {module.BUSY: 0.05})
    with pytest.raises(ConnectionError, match="it is busy"):
        fetch(dht, str(PEER), PIPELINE, limit=2**20)
    monkeypatch.setattr(module, "WAIT_SECONDS", {module.BUSY: 1e3})
    servicer.bytes.rate = 1e7
    assert fetch(dht, str(PEER), PIPELINE, limit=2**20) == FILES[PIPELINE]


def test_peer_that_starts_lets_others_wait(monkeypatch):
    servicer = RunFiles()
    servicer.names = None
    monkeypatch.setattr(module, "WAIT_SECONDS", {module.BUSY: 0.05})
    with pytest.raises(ConnectionError, match="it is busy"):
        fetch_manifest(asking(servicer, monkeypatch), str(PEER))


def test_strangers_get_nothing_of_a_private_run(folder, monkeypatch):
    class Gate:
        async def objection(self, peer):
            return "has shown no valid token"

    monkeypatch.setattr(RunFiles, "_gate", Gate())
    monkeypatch.setattr(module, "WAIT_SECONDS", {})
    with pytest.raises(ConnectionError, match="does not let this peer in"):
        fetch_manifest(asking(serving(folder), monkeypatch), str(PEER))


async def stop_answering(dht, node):
    await node.run_files.remove_p2p_handlers(node.p2p)


@pytest.mark.swarm
def test_files_travel_between_nodes(folder, shut_down_at_end):
    def start(*known):
        peer = PeerArguments(run_id="run", host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=[*known])
        return shut_down_at_end(start_dht(peer, Identity(RSAPrivateKey()))[0])

    first = start()
    (address,) = visible_addresses(first)
    second, peer_id = start(address), address.rsplit("/", 1)[1]
    with pytest.raises(NothingThereError):
        fetch_manifest(second, peer_id)
    hand_over(first, folder, manifest_of_demo())
    content, signature = fetch_manifest(second, peer_id)
    assert (json.loads(content)["run_id"], signature) == ("run", b"signed")
    for name, (digest, size) in manifest_of_demo().files.items():
        assert fetch_file(second, peer_id, name, digest, size) == FILES[name]
    first.run_coroutine(stop_answering)  # as an older version
    with pytest.raises(NothingThereError):
        fetch_manifest(second, peer_id)
