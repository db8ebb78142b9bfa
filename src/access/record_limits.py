"""How many records a node keeps, and whose when there are too many: those of the peers that it has known longest.

A key costs nothing, so anybody may have ten thousand, with a record under each. hivemind 1.1.12 (dht/storage.py) keeps
them all: every look at such a list takes every peer seconds, and a list of more than 4 MiB is handed over no more
(p2p/p2p_daemon_bindings/control.py), so that nobody finds anybody.
"""

import heapq
import math
import time
from collections.abc import Collection, Iterable
from functools import partial
from itertools import count

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID

MAX_ENTRIES, MAX_BYTES_OF_ALL = 512, 3 * 2**19  # of one list; subkeys have half a kilobyte each beside that
MAX_FOREIGN_LISTS = 32  # beside those of the run: another one may use the same nodes
MAX_FRIENDS, MAX_SEEN = 256, 4096
FORGET_SECONDS = 3600.0  # after which one that was not seen any more makes room for another
SPARE_HEAP = 64


def lists_of_run(run_id: str) -> set[DHTID]:
    """Where the peers of a run store what the others need."""
    names = [f"{run_id}_{name}" for name in ("progress", "metrics", "card", "members", "checkpoints")]
    for kind in ("grad", "state", "local_grad", "local_state"):
        names += [f"{run_id}_{kind}_averager.{name}" for name in ("0b", "all_averagers")]
    return {DHTID.generate(source=name) for name in names}


class Acquaintances:
    """Whose records are kept: first this peer's, those of its initial peers and of partners in rounds, who are
    ``friends``; then those of others, in the order in which their first one came.

    Peers are known by their ids, as bytes, and by the subkeys that name their public keys.
    """

    def __init__(self, friends: Iterable[bytes] = ()):
        self.friends: dict[bytes, int] = {}
        self.seen: dict[bytes, tuple[int, float]] = {}  # peer -> its number, and when it was last seen
        self._peers: dict[bytes, bytes] = {}  # subkey -> peer, of those that are known
        self._subkeys: dict[bytes, bytes] = {}  # the other way round
        self._numbers, self._tidied_at = count(), -math.inf
        self.befriend(friends)

    def befriend(self, peers: Iterable[bytes]) -> None:
        for peer in peers:
            if peer not in self.friends and len(self.friends) < MAX_FRIENDS:
                self.friends[peer] = len(self.friends)

    def note(self, subkey: bytes, peer: bytes) -> None:
        """There is a good record of a peer."""
        now = time.monotonic()
        if peer not in self.seen:
            if len(self.seen) >= MAX_SEEN:
                self._tidy(now)
            if len(self.seen) >= MAX_SEEN and peer not in self.friends:
                return
        number, _ = self.seen.get(peer) or (next(self._numbers), now)
        self.seen[peer] = number, now
        if subkey != peer:
            self._peers[subkey], self._subkeys[peer] = peer, subkey

    def _tidy(self, now: float) -> None:
        if now < self._tidied_at + 1.0:
            return  # who comes with many keys must not keep this peer busy
        self._tidied_at = now
        for peer in [peer for peer, (_, last) in self.seen.items() if last < now - FORGET_SECONDS]:
            del self.seen[peer]
            self._peers.pop(self._subkeys.pop(peer, None), None)

    def rank(self, subkey: object) -> float:
        """The lower, the longer known; infinite for whoever is not."""
        if not isinstance(subkey, bytes):
            return math.inf
        peer = self._peers.get(subkey, subkey)
        if peer in self.friends:
            return self.friends[peer] - MAX_FRIENDS
        return self.seen[peer][0] if peer in self.seen else math.inf


async def _befriend(dht, node, *, peers: Collection[bytes]) -> None:
    DictionaryDHTValue.acquaintances.befriend(peers)


def befriend(dht, peers: Iterable[PeerID]) -> None:
    """Let the node keep the records of these peers before those of others; does not wait for it."""
    dht.run_coroutine(partial(_befriend, peers=[peer.to_bytes() for peer in peers]), return_future=True)


def limit_records() -> None:
    """Let all lists of this process' nodes have bounds; whom they know says `know`."""
    DictionaryDHTValue.store_unlimited, DictionaryDHTValue.store = DictionaryDHTValue.store, _store_entry
    DictionaryDHTValue.worst_kept = math.inf
    DHTLocalStorage.store_unlimited, DHTLocalStorage.store = DHTLocalStorage.store, _store_list
    know(Acquaintances(()), "")


def know(acquaintances: Acquaintances, run_id: str) -> None:
    """Of the node that is started next in this process: whom it knows, and which run's lists are its own."""
    DictionaryDHTValue.acquaintances, DHTLocalStorage.own_lists = acquaintances, lists_of_run(run_id)


def _store_entry(self: DictionaryDHTValue, subkey, value, expiration_time) -> bool:
    """In a list; one that is just being read is as long as it came, and `sift_dictionaries` looks at it."""
    if self.frozen:
        return self.store_unlimited(subkey, value, expiration_time)
    self._remove_outdated()
    rank = self.acquaintances.rank
    is_new = subkey not in self.data
    if is_new and len(self.data) >= MAX_ENTRIES and rank(subkey) >= self.worst_kept:
        return False
    stored = self.store_unlimited(subkey, value, expiration_time)
    _drop_ghosts(self)
    if is_new:
        self.worst_kept = math.inf
    while stored and _is_too_long(self):
        worst = max(reversed(self.data), key=rank)  # the last of those that are equal
        self.worst_kept = rank(worst)
        del self[worst]
        stored = worst != subkey
    return stored


def _is_too_long(entries: DictionaryDHTValue) -> bool:
    if len(entries.data) > MAX_ENTRIES:
        return True
    return sum(len(entry.value) for entry in entries.data.values()) > MAX_BYTES_OF_ALL


def _drop_ghosts(storage) -> None:
    """Of entries that were stored again: hivemind keeps one for each time, until it has expired."""
    if len(storage.expiration_heap) > 2 * len(storage.data) + SPARE_HEAP:
        storage.expiration_heap = list(storage.key_to_heap.values())
        heapq.heapify(storage.expiration_heap)


def _store_list(self: DHTLocalStorage, key: DHTID, value, expiration_time, subkey=None) -> bool:
    is_foreign = key not in self and key not in self.own_lists
    if is_foreign and sum(other not in self.own_lists for other in self.data) >= MAX_FOREIGN_LISTS:
        return False
    stored = self.store_unlimited(key, value, expiration_time, subkey)
    _drop_ghosts(self)
    return stored
