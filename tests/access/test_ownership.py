"""A record belongs to the peer whose key its subkey names; what a stranger writes replaces nothing and hides nobody."""

import asyncio
import contextlib
import dataclasses
import stat
import time
from functools import partial
from pathlib import Path

import hivemind
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import CompositeValidator, DHTRecord
from hivemind.p2p import P2P
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey
from hivemind.utils.timed_storage import ValueWithExpiration

from arguments import PeerArguments
from src.access import record_limits
from src.access.membership import load_identity
from src.access.ownership import MAX_BYTES, MAX_LIFETIME, OwnedRecords, name_of, peer_id_of, peer_of
from src.access.record_limits import Acquaintances, befriend, know
from src.swarm import dht as dht_module
from src.swarm import hivemind_fixes
from src.swarm.dht import start_dht
from tests.reference.node import LOOPBACK, start_node

KEY = "r_grad_averager.0b"
FAR = 1e8  # seconds: three years


def public_key(key: RSAPrivateKey) -> bytes:
    return key.get_public_key().to_bytes()


def owner_of(key: RSAPrivateKey) -> bytes:
    return b"[owner:" + public_key(key) + b"]"


@pytest.fixture(scope="module")
def keys():
    return [RSAPrivateKey() for _ in range(2)]


@pytest.fixture
def own(keys):
    return OwnedRecords(keys[0], "r")


def record(subkey: object, value: object = True, *, key: str = KEY, lasts: float = 30.0) -> DHTRecord:
    return DHTRecord(
        DHTID.generate(source=key).to_bytes(),
        MSGPackSerializer.dumps(subkey),
        value if isinstance(value, bytes) else MSGPackSerializer.dumps(value),
        get_dht_time() + lasts,
    )


def signed(own: OwnedRecords, unsigned: DHTRecord) -> DHTRecord:
    return dataclasses.replace(unsigned, value=own.sign_value(unsigned))


# -- one record -------------------------------------------------------------------------------------------------------


def test_peer_owns_what_lies_under_its_key_and_under_its_peer_id(own, keys):
    checker = OwnedRecords(keys[1], "r")
    for subkey in (own.local_public_key, own.peer_id):
        for value in (True, None, -1.5, "text", {"epoch": 3}, [b"[owner:me]", b"[signature:AAAA]"]):
            stored = signed(own, record(subkey, value))
            assert checker.validate(stored), value
            assert MSGPackSerializer.loads(checker.strip_value(stored)) == value
            for changes in ({"expiration_time": stored.expiration_time + 1}, {"key": record(b"", key="r_card").key},
                            {"value": stored.value.replace(MSGPackSerializer.dumps(value), b"\xc2", 1)}):  # fmt: skip
                assert not checker.validate(dataclasses.replace(stored, **changes)), changes


def forgeries(own: OwnedRecords, other: RSAPrivateKey) -> dict[str, DHTRecord]:
    """What a stranger, who has the key of ``own``, may try against the peer with the ``other`` key."""
    victim = peer_id_of(public_key(other)).to_bytes()

    def signed_with_own(subkey, value=True, **options) -> DHTRecord:
        unsigned = record(subkey, value, **options)
        signature = b"[signature:" + own._private_key.sign(own._serialize_record(unsigned)) + b"]"
        return dataclasses.replace(unsigned, value=unsigned.value + own.local_public_key + signature)

    def under_own_key(subkey, **options) -> DHTRecord:
        unsigned = record(subkey, **options)
        signature = b"[signature:" + own._private_key.sign(own._serialize_record(unsigned)) + b"]"
        return dataclasses.replace(unsigned, value=unsigned.value + signature)

    deep = b"\x91" * 9 + b"\xc0"
    return {
        "a plain value": record(None),
        "a plain value, signed": signed_with_own(None),
        "no owner": record(b"some subkey"),
        "no owner, signed": signed_with_own(b"some subkey"),
        "a number for a subkey": signed_with_own(7),
        "the victim's peer id, unsigned": record(victim),
        "the victim's peer id": signed_with_own(victim),
        "the victim's key": under_own_key(owner_of(other)),
        "own key with something before it": under_own_key(b"1" + own.local_public_key),
        "own key with a comment": under_own_key(own.local_public_key[:-1] + b" 1]"),
        "own key written otherwise": under_own_key(own.local_public_key[:-1] + b"==]"),
        "two owners": under_own_key(own.local_public_key + owner_of(other)),
        "no key": under_own_key(b"[owner:ssh-rsa AAAA]"),
        "years ahead": signed(own, record(own.peer_id, lasts=FAR)),
        "for ever": signed(own, record(own.peer_id, lasts=float("inf"))),
        "at no time": signed(own, record(own.peer_id, lasts=float("nan"))),
        "too large": signed(own, record(own.peer_id, value=b"\xc6" + MAX_BYTES.to_bytes(4) + bytes(MAX_BYTES))),
        "no value": signed(own, record(own.peer_id, value=b"\xc1")),
        "half a value": signed(own, record(own.peer_id, value=b"\x92\x01")),
        "too deep": signed(own, record(own.peer_id, value=deep)),
        "an object of hivemind's": signed(own, record(own.peer_id, DictionaryDHTValue())),
    }


@pytest.mark.parametrize("kind", forgeries(OwnedRecords(RSAPrivateKey(), "r"), RSAPrivateKey()))
def test_forged_record_is_refused(own, keys, kind):
    assert not OwnedRecords(keys[1], "r").validate(forgeries(own, keys[1])[kind])


def test_list_of_revoked_keys_has_room(own, keys):
    value = [b"token", bytes(100_000)]
    for key, fits in (("r_members", True), ("r_card", False)):
        assert OwnedRecords(keys[1], "r").validate(signed(own, record(own.local_public_key, value, key=key))) == fits


def test_name_of_an_owner_is_the_peer_id_of_its_key(keys):
    assert name_of(owner_of(keys[0])) == peer_id_of(public_key(keys[0])).to_base58()
    started = time.process_time()
    for other in (b"\xff" * 250_000, b"[owner:" + bytes(250_000) + b"]", b"", b"[owner:ssh-rsa AAAA]", 7):
        assert name_of(other) == "?" and peer_of(other) is None
    assert time.process_time() - started < 0.1


def test_checking_a_record_again_is_cheap(own, keys):
    checker, stored = OwnedRecords(keys[1], "r"), signed(own, record(own.peer_id))
    checker.validate(stored)
    started = time.process_time()
    assert all(checker.validate(stored) for _ in range(1000))
    assert time.process_time() - started < 0.5


# -- a dictionary of them ---------------------------------------------------------------------------------------------


def dictionary(*records: DHTRecord, claims: float) -> DictionaryDHTValue:
    entries = DictionaryDHTValue(maxsize=1)  # as a stranger may have it
    with entries.freeze():
        for one in records:
            entries.data[MSGPackSerializer.loads(one.subkey)] = ValueWithExpiration(one.value, one.expiration_time)
    entries.latest_expiration_time = claims
    return entries


def test_one_bad_entry_leaves_the_others_of_a_dictionary(own, keys):
    hivemind_fixes.apply()
    know(own.acquaintances, "r")
    protocol = DHTProtocol(_initialized_with_create=True)
    protocol.record_validator = CompositeValidator([OwnedRecords(keys[1], "r")])
    good = signed(own, record(own.peer_id))
    for name, bad in forgeries(own, keys[1]).items():
        if "number" in name or bad.subkey == good.subkey:
            continue
        entries = dictionary(bad, good, claims=get_dht_time() + FAR)
        assert protocol._validate_dictionary(good.key, entries), name
        assert dict(entries.items()) == {own.peer_id: ValueWithExpiration(good.value, good.expiration_time)}, name
        assert entries.latest_expiration_time == good.expiration_time
        assert not protocol._validate_dictionary(good.key, dictionary(bad, claims=FAR)), name


def test_answer_that_claims_to_be_the_newest_for_ever_does_not_end_all_searches(own, keys, monkeypatch):
    hivemind_fixes.apply()
    good, key = signed(own, record(own.peer_id)), DHTID.generate(source=KEY)

    async def find_unsifted(protocol, peer, keys):
        entries = DictionaryDHTValue()
        entries.store(own.peer_id, good.value, good.expiration_time)
        return {key: (ValueWithExpiration(entries, float("inf")), {}), DHTID.generate(): (None, {})}

    monkeypatch.setattr(DHTProtocol, "find_unsifted", find_unsifted)
    found, _ = asyncio.run(DHTProtocol(_initialized_with_create=True).call_find(None, [key]))[key]
    assert found.expiration_time == good.expiration_time


def test_hivemind_still_does_what_sifting_mends():
    """If it fails, hivemind has learnt it, and `sift_dictionaries` can go."""
    source = Path(hivemind.dht.protocol.__file__).read_text()
    assert "                if not self.record_validator.validate(record):\n                    return False" in source
    assert "ValueWithExpiration(value_dictionary, result.expiration_time)" in source


# -- over the network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swarm():
    """Two peers, and a stranger's node, which checks nothing and stores whatever it likes."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(2):
            nodes.append(start_node("r", *nodes)[0])
            stack.callback(nodes[-1].shutdown)
        address = str(nodes[0].get_visible_maddrs()[0])
        stranger = hivemind.DHT(start=True, initial_peers=[address], host_maddrs=[LOOPBACK])
        stack.callback(stranger.shutdown)
        yield *nodes, stranger


def values(node, key: str) -> list:
    found = node.get(key, latest=True)
    return [entry.value for entry in found.value.values()] if found is not None else []


@pytest.mark.parametrize(
    ("key", "value"),
    [("r_grad_averager.0b", True), ("r_state_averager.0b", True), ("r_state_averager.all_averagers", 5.0),
     ("r_card", "{}"), ("r_progress", {"epoch": 1})],
)  # fmt: skip
@pytest.mark.parametrize("how", ["under their ids", "over the whole key", "as somebody"])
def test_stranger_replaces_nothing_that_peers_publish(swarm, key, value, how):
    first, second, stranger = swarm
    key = f"{key}, {how}"  # what is stored in one case must not matter in the next

    def publish(seconds: float) -> None:
        for node in (first, second):
            node.store(key, value, get_dht_time() + seconds, subkey=node.peer_id.to_bytes())

    publish(60)
    if how == "under their ids":
        for node in (first, second):
            stranger.store(key, -1.0, get_dht_time() + FAR, subkey=node.peer_id.to_bytes())
    elif how == "over the whole key":
        stranger.store(key, b"x", get_dht_time() + FAR)
    else:
        stranger.store(key, "junk", get_dht_time() + FAR, subkey=b"somebody")
    publish(61)
    for node in (first, second):
        assert values(node, key) == [value, value]


# -- more of them than there is room for ------------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch):
    """Few entries, so that tests need few keys."""
    monkeypatch.setattr(record_limits, "MAX_ENTRIES", 4)
    hivemind_fixes.apply()
    know(known := Acquaintances(), "r")
    return known


def subkeys_after(*stored: bytes) -> list[bytes]:
    entries = DictionaryDHTValue()
    for number, subkey in enumerate(stored):
        entries.store(subkey, b"x", get_dht_time() + 60 + number)
    return list(entries.data)


def test_list_that_is_full_keeps_the_peers_that_are_known_longest(room):
    for number in range(3):
        room.note(b"[owner:%d]" % number, b"peer %d" % number)
    strangers = [b"stranger %d" % number for number in range(6)]
    assert subkeys_after(*strangers) == strangers[:4], "of two that nobody knows the first"
    honest = [b"peer 2", b"[owner:0]", b"[owner:1]"]  # under their keys or their ids
    assert subkeys_after(*strangers, *honest) == [strangers[0], *honest]
    assert subkeys_after(*honest, *strangers) == [*honest, strangers[0]]
    for number in (7, 8):
        room.note(b"later %d" % number, b"later %d" % number)
    assert subkeys_after(b"later 7", *honest, b"later 8") == [b"later 7", *honest]
    room.befriend([b"later 8"])  # an initial peer, or a partner of a round
    assert subkeys_after(b"later 7", *honest, b"later 8") == [*honest, b"later 8"]


def test_renewed_entry_keeps_its_place_and_one_that_expires_makes_room(room, monkeypatch):
    entries, now = DictionaryDHTValue(), get_dht_time()
    for number in range(4):
        assert entries.store(b"%d" % number, b"x", now + 60 + number)
    assert entries.store(b"0", b"y", now + 90) and len(entries) == 4
    assert not entries.store(b"4", b"x", now + 95)
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: now + 61.5)
    assert entries.store(b"4", b"x", now + 95) and list(entries.data) == [b"0", b"2", b"3", b"4"]


def test_list_is_never_too_large_to_be_handed_over(room, monkeypatch):
    monkeypatch.setattr(record_limits, "MAX_BYTES_OF_ALL", 1000)
    room.note(b"honest", b"honest")
    entries, now = DictionaryDHTValue(), get_dht_time()
    for number in range(3):
        entries.store(b"%d" % number, bytes(400), now + 60)
    assert entries.store(b"honest", bytes(300), now + 60)
    assert sorted(entries.data) == [b"0", b"honest"]


def test_same_entry_stored_again_and_again_takes_no_memory(room):
    entries, storage, now, key = (
        DictionaryDHTValue(),
        DHTLocalStorage(),
        get_dht_time(),
        DHTID.generate(source="r_card"),
    )
    for number in range(2000):
        entries.store(b"one", b"x", now + 60 + number / 1e3)
        storage.store(key, b"x", now + 60 + number / 1e3, subkey=b"one")
    assert max(len(one.expiration_heap) for one in (entries, storage, storage.get(key).value)) < 100
    assert list(entries.items()) == [(b"one", ValueWithExpiration(b"x", now + 60 + 1.999))]


def test_lists_of_strangers_are_few_and_those_of_the_run_always_have_room(room):
    storage, later = DHTLocalStorage(), get_dht_time() + 60
    stored = [storage.store(DHTID.generate(source=f"{i}"), b"x", later, subkey=b"s") for i in range(100)]
    assert sum(stored) == record_limits.MAX_FOREIGN_LISTS
    names = ["r_progress", "r_metrics", "r_card", "r_members", "r_checkpoints"]
    names += [f"r_{kind}_averager.{name}" for kind in ("grad", "state") for name in ("0b", "all_averagers")]
    assert all(storage.store(DHTID.generate(source=name), b"x", later, subkey=b"s") for name in names)
    assert storage.store(DHTID.generate(source="0"), b"x", later + 1, subkey=b"s"), "what is there may be renewed"


def test_what_is_known_of_peers_is_bounded_and_those_that_are_gone_make_room(monkeypatch):
    monkeypatch.setattr(record_limits, "MAX_SEEN", 4)
    monkeypatch.setattr(record_limits, "MAX_FRIENDS", 2)
    now = [1000.0]
    monkeypatch.setattr(record_limits.time, "monotonic", lambda: now[0])
    known = Acquaintances([b"friend"])
    for number in range(9):
        known.note(b"[owner:%d]" % number, b"%d" % number)
    assert [known.rank(b"%d" % number) < 9 for number in range(9)] == [True] * 4 + [False] * 5
    known.befriend([b"8", b"7"])
    assert known.rank(b"friend") < known.rank(b"8") < known.rank(b"0") < known.rank(b"7") == float("inf")
    now[0] += record_limits.FORGET_SECONDS / 2
    known.note(b"[owner:1]", b"1")
    now[0] += record_limits.FORGET_SECONDS / 2 + 1
    known.note(b"[owner:5]", b"5")
    assert known.rank(b"[owner:1]") < known.rank(b"[owner:5]") < known.rank(b"[owner:0]")
    assert len(known._peers) == len(known._subkeys) == len(known.seen) == 2


def test_strangers_with_many_keys_do_not_hide_the_peers_of_a_run(monkeypatch, shut_down_at_end):
    monkeypatch.setattr(record_limits, "MAX_ENTRIES", 6)
    first, _ = start_node("r")
    shut_down_at_end(first)
    second, _ = start_node("r", first)
    shut_down_at_end(second)
    stranger = hivemind.DHT(start=True, initial_peers=[str(first.get_visible_maddrs()[0])], host_maddrs=[LOOPBACK])
    shut_down_at_end(stranger)
    key, keys = "r_progress", [RSAPrivateKey() for _ in range(10)]

    def publish(node, seconds: float) -> None:
        node.store(key, "honest", get_dht_time() + seconds, subkey=node.peer_id.to_bytes())

    def flood(node, seconds: float) -> None:
        for one in keys:
            other = OwnedRecords(one, "r")
            false = signed(other, record(other.peer_id, "false", key=key, lasts=seconds))
            node.run_coroutine(partial(store_as_it_is, false=false))

    publish(first, 60)
    publish(second, 60)
    flood(stranger, 900)
    newcomer, _ = start_node("r", first)
    shut_down_at_end(newcomer)
    befriend(first, [newcomer.peer_id])  # as after a round with it
    befriend(second, [newcomer.peer_id])
    for node in (first, second, newcomer):
        publish(node, 61)
    for node in (first, second, newcomer):
        found = values(node, key)
        assert found.count("honest") == 3 and len(found) == 6, node.peer_id


async def store_as_it_is(dht, node, *, false: DHTRecord) -> None:
    """What somebody has signed already, at each node that there is."""
    protocol = node.protocol
    for peer in set(protocol.routing_table.uid_to_peer_id.values()):
        subkey = MSGPackSerializer.loads(false.subkey)
        assert await protocol.call_store(
            peer, [DHTID.from_bytes(false.key)], [false.value], [false.expiration_time], subkeys=[subkey]
        )


# -- the key is the node's identity -----------------------------------------------------------------------------------


def test_node_has_the_identity_of_its_record_key_and_leaves_no_file(monkeypatch, shut_down_at_end):
    modes, paths, make = [], [], dht_module.WatchedDHT

    def watch(**options):
        path = Path(options["identity_path"])
        paths.append(path)
        modes.append((stat.S_IMODE(path.stat().st_mode) & 0o077, stat.S_IMODE(path.parent.stat().st_mode) & 0o077))
        return make(**options)

    monkeypatch.setattr(dht_module, "WatchedDHT", watch)
    node, identity = start_node("r")
    shut_down_at_end(node)
    assert node.peer_id == peer_id_of(public_key(identity.private_key))
    assert modes == [(0, 0)], "nobody else may read the key"
    assert not paths[0].parent.exists()


def test_client_has_the_identity_of_its_record_key(shut_down_at_end, swarm):
    node, identity = start_node("r", swarm[0], client_mode=True)
    shut_down_at_end(node)
    assert node.peer_id == peer_id_of(public_key(identity.private_key))
    assert node.store("r_grad_averager.0b11", True, get_dht_time() + 60, subkey=node.peer_id.to_bytes())
    assert values(swarm[1], "r_grad_averager.0b11") == [True]


def test_identity_file_that_hivemind_made_still_gives_the_same_peer(tmp_path, shut_down_at_end):
    path = tmp_path / "old.pem"
    P2P.generate_identity(str(path))
    peer = PeerArguments(run_id="r", host_maddrs=[LOOPBACK], identity_path=str(path))
    node, owner = start_dht(peer, load_identity(peer))
    shut_down_at_end(node)
    assert node.peer_id.to_bytes() == peer_of(owner)
    assert node.peer_id.to_base58() == name_of(owner)


def test_records_that_honest_peers_store_last_no_longer_than_is_allowed(monkeypatch):
    stored = []
    node = type("Node", (), {"store": lambda self, **record: stored.append(record)})()
    dht_module.store_metrics(node, "r", b"owner", dht_module.TrainerMetrics(epoch=1), expiration=1e6)
    assert stored[0]["expiration_time"] <= get_dht_time() + MAX_LIFETIME
