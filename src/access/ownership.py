"""Who owns a record in the DHT: the peer that holds the private key of its subkey, and nobody else.

hivemind 1.1.12 protects a record only if its key or subkey names a public key. What its matchmaking stores under bare
peer ids, and any plain value, which replaces a whole dictionary, is open to everybody; the later expiration wins.

Here each record of the DHT is an entry of a dictionary, and its subkey is its owner: ``[owner:PUBLIC KEY]``, or the
peer id that this key gives. A peer has one key, which also is its identity in the network; so who owns a record can
be called, and who is called has proved that the key is its own.
"""

import dataclasses
import functools
import hashlib
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable

import msgpack
from cryptography.hazmat.primitives import serialization
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey
from hivemind.utils.timed_storage import ValueWithExpiration

from src.access.record_limits import Acquaintances

logger = logging.getLogger(__name__)

MAX_BYTES, MAX_MEMBER_BYTES = 2**14, 2**19  # of a record; a member's holds the organiser's list of revoked keys
MAX_DEPTH = 8  # of lists and dictionaries in a record
MAX_LIFETIME = 3600.0  # seconds from now to a record's expiration
MAX_CLOCK_ERROR = 60.0  # seconds by which the clock of who stores may be ahead
MAX_KEY_BITS, MAX_REMEMBERED = 4096, 4096
MAX_BAD_ENTRIES = 100  # of a list, after which the rest of it is not looked at
_OWNER = re.compile(rb"\[owner:(ssh-rsa [A-Za-z0-9+/=]{1,1000})\]")
_SIGNATURE = re.compile(rb"[A-Za-z0-9+/=]{1,1000}")


def peer_id_of(public_key: bytes) -> PeerID:
    """The libp2p peer id of whoever holds the private key (https://github.com/libp2p/specs, peer-ids)."""
    der = serialization.load_ssh_public_key(public_key).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    message = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=der).SerializeToString()
    return PeerID(b"\x12\x20" + hashlib.sha256(message).digest())  # the code of SHA-256, and its 32 bytes


@functools.lru_cache(MAX_REMEMBERED)
def _read_key(public_key: bytes) -> tuple[RSAPublicKey, bytes] | None:
    """The key and the peer id that it gives, or None if it is none that a peer may have.

    A key can be written in many ways, with a comment, say, and would then own many records.
    """
    try:
        key = RSAPublicKey.from_bytes(public_key)
        numbers = key._public_key.public_numbers()
        if key.to_bytes() != public_key or numbers.n.bit_length() > MAX_KEY_BITS or numbers.e.bit_length() > 32:
            return None
        return key, peer_id_of(public_key).to_bytes()
    except Exception:  # of cryptography, which has many
        return None


def peer_of_key(public_key: bytes) -> bytes | None:
    """The peer id of whoever holds the private key; None if that is no key that a peer may have."""
    known = _read_key(public_key)
    return None if known is None else known[1]


def peer_of(owner: object) -> bytes | None:
    """The peer id of the owner of a record, from its subkey ``[owner:PUBLIC KEY]``; None if that is something else."""
    found = _OWNER.fullmatch(owner) if isinstance(owner, bytes) else None
    return None if found is None else peer_of_key(found.group(1))


def name_of(owner: object) -> str:
    """The peer id as text, as others see this peer in the network; ``?`` for a subkey that names no key."""
    peer = peer_of(owner)
    return "?" if peer is None else PeerID(peer).to_base58()


def names_in(addresses: Iterable[object]) -> list[str]:
    """The peer ids, as text, that addresses of peers end in."""
    return sorted({str(address).rsplit("/p2p/", 1)[1] for address in addresses if "/p2p/" in str(address)})


class OwnedRecords(RSASignatureValidator):
    """Signs what this peer stores, and takes from others only what its owner has signed, in bounds of size and time.

    A signed value is ``content[signature:...]``, or ``content[owner:...][signature:...]`` under a bare peer id, which
    does not tell the key. The signature covers key, subkey, content and expiration.

    ``is_revoked(owner)``: in a private run, whether the records of the owner of ``[owner:PUBLIC KEY]`` are refused.
    That of its token is not, so that everybody can say why it is not let in.
    """

    def __init__(
        self,
        private_key: RSAPrivateKey,
        run_id: str,
        acquaintances: Acquaintances | None = None,
        is_revoked: Callable[[bytes], bool] = lambda owner: False,
    ):
        super().__init__(private_key)
        self.acquaintances = Acquaintances() if acquaintances is None else acquaintances
        self.is_revoked = is_revoked
        self.peer_id = peer_id_of(private_key.get_public_key().to_bytes()).to_bytes()
        self._members_key = DHTID.generate(source=f"{run_id}_members").to_bytes()
        self._verified: OrderedDict[bytes, None] = OrderedDict()  # digests: the same records are read again and again

    def validate(self, record: DHTRecord) -> bool:
        try:
            objection = self._objection(record)
        except Exception as error:  # whatever a stranger has made up
            objection = repr(error)
        if objection:
            logger.debug("refused a record: %s", objection)
        return not objection

    def _objection(self, record: DHTRecord) -> str:
        if len(record.value) > (MAX_MEMBER_BYTES if record.key == self._members_key else MAX_BYTES):
            return "it is too large"
        if not -math.inf < record.expiration_time <= get_dht_time() + MAX_LIFETIME + MAX_CLOCK_ERROR:
            return "it expires too late"
        content, public_key, signature = self._parts(record.value)
        owner, under_peer_id = self._owner(record.subkey)
        if owner is None or (public_key is None) == under_peer_id:
            return "it has no owner"
        public_key = owner if public_key is None else public_key
        known = _read_key(public_key)
        if known is None or (under_peer_id and known[1] != owner):
            return "its owner is not who its subkey says"
        if record.key != self._members_key and self.is_revoked(b"[owner:" + public_key + b"]"):
            return "its owner was shut out"
        if not self._is_signed(known, dataclasses.replace(record, value=content), signature):
            return "its owner has not signed it"
        if not _is_shallow(_loads(content), MAX_DEPTH):
            return "it is too deep"
        self.acquaintances.note(_loads(record.subkey), known[1])
        return ""

    @staticmethod
    def _owner(subkey: bytes) -> tuple[bytes | None, bool]:
        """The public key, or the peer id and True, of a serialized subkey."""
        name = _loads(subkey)
        if not isinstance(name, bytes):
            return None, False
        found = _OWNER.fullmatch(name)
        return (name, True) if found is None else (found.group(1), False)

    @staticmethod
    def _parts(value: bytes) -> tuple[bytes, bytes | None, bytes]:
        """Content, public key if there is one, and signature, which is empty if there is none."""
        content, mark, signature = value.rpartition(b"[signature:")
        if not mark or not _SIGNATURE.fullmatch(signature[:-1]) or signature[-1:] != b"]":
            return value, None, b""
        start = content.rfind(b"[owner:")
        found = _OWNER.fullmatch(content, start) if start >= 0 else None
        return (content, None, signature[:-1]) if found is None else (content[:start], found.group(1), signature[:-1])

    def _is_signed(self, known: tuple[RSAPublicKey, bytes], record: DHTRecord, signature: bytes) -> bool:
        key, peer = known
        serialized = self._serialize_record(record)
        digest = hashlib.sha256(peer + hashlib.sha256(signature).digest() + serialized).digest()
        if digest not in self._verified:
            if not key.verify(serialized, signature):
                return False
            self._verified[digest] = None
            if len(self._verified) > MAX_REMEMBERED:
                self._verified.popitem(last=False)
        return True

    def sign_value(self, record: DHTRecord) -> bytes:
        subkey = _loads(record.subkey)
        if subkey not in (self.local_public_key, self.peer_id):
            return record.value
        owner = self.local_public_key if subkey == self.peer_id else b""
        signature = self._private_key.sign(self._serialize_record(record))
        return record.value + owner + self.SIGNATURE_FORMAT.replace(b"_value_", signature)

    def strip_value(self, record: DHTRecord) -> bytes:
        return self._parts(record.value)[0]


def _loads(content: bytes) -> object:
    """Plain values only; hivemind's own types would be built from whatever a stranger sends."""
    return msgpack.unpackb(content, raw=False, ext_hook=_no_extension)


def _no_extension(code: int, data: bytes):
    raise ValueError(f"type {code} is none that a record may hold")


def _is_shallow(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def sift_dictionaries() -> None:
    """Let a node keep the good entries of a dictionary that another one sends, and believe no expiration but theirs.

    Of more than its own have room for it takes those of the peers that it knows longest, see `limit_records`.

    hivemind 1.1.12 throws the whole dictionary away for one bad entry (dht/protocol.py:416, `_validate_dictionary`), so
    that whoever holds one hides those of all others. And it takes the dictionary's own expiration unseen (:324, in
    `call_find`): the latest ends a search at once, and what was found is then kept as the newest for ever.
    """
    DHTProtocol.find_unsifted = DHTProtocol.call_find

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        good, num_bad, now = DictionaryDHTValue(), 0, get_dht_time()
        rank = DictionaryDHTValue.acquaintances.rank
        for subkey, (value, expiration) in sorted(dictionary.data.items(), key=lambda item: rank(item[0])):
            subkey_bytes = MSGPackSerializer.dumps(subkey)
            if not isinstance(expiration, (int, float)) or not expiration >= now:
                continue
            if not self._validate_record(key_bytes, subkey_bytes, value, expiration):
                num_bad += 1
                is_enough = num_bad >= MAX_BAD_ENTRIES
            else:
                is_enough = not good.store(subkey, value, expiration)
            if is_enough:
                break
        vars(dictionary).update(vars(good), latest_expiration_time=good.latest_expiration_time)
        return bool(good.data)

    async def call_find(self, peer: PeerID, keys):
        output = await self.find_unsifted(peer, keys)
        for key, (found, nearest) in (output or {}).items():
            if found is not None and isinstance(found.value, DictionaryDHTValue):
                output[key] = ValueWithExpiration(found.value, found.value.latest_expiration_time), nearest
        return output

    DHTProtocol._validate_dictionary, DHTProtocol.call_find = _validate_dictionary, call_find
