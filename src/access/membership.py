"""Private runs: an organiser signs who may join, offline; members check each other, and no server is needed.

One RSA key per peer is its libp2p identity, the owner of its DHT records, and what its token is issued for. The
transport proves that a caller holds the key its peer id derives from, so a token need not be kept secret.
"""

import base64
import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hivemind
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from arguments import PeerArguments
from src.access.keys import create_key, fingerprint, load_key, public_key_of
from src.access.ownership import peer_of, peer_of_key
from src.access.tokens import EXPIRED, REVOCATIONS_FILE, REVOKED, Revocations, _signed_part, read_revocations
from src.files import try_lock

logger = logging.getLogger(__name__)


PUBLISH_SECONDS, EXPIRE_SECONDS = 20.0, 90.0  # a member's record in the DHT: how often renewed, how long valid


class Membership:
    """This peer's token, and who else is a member: whoever has a valid token that is not revoked.

    Raises ValueError with one line if the token is damaged, expired, of another run, or of another key.
    """

    def __init__(self, token_file: Path, key: RSAPrivateKey, run_id: str):
        self.token_file, self.private_key, self.run_id = token_file, key, run_id
        self.revocations = Revocations()
        self._verified: dict[bytes, float] = {}  # what the organiser has signed of tokens -> when they expire
        self.token, self.organiser = self._read_token()
        self.read_revocations_file()
        problem = self.objection(self.token)
        if problem:
            raise ValueError(f"--authorize {token_file}: the token {problem}; ask the run's organiser for a new one")

    def _read_token(self) -> tuple[AccessToken, RSAPublicKey]:
        try:
            content = json.loads(self.token_file.read_text(encoding="utf-8-sig"))
            token = AccessToken.FromString(base64.b64decode(content["token"]))
            organiser = RSAPublicKey.from_bytes(content["organiser"].encode())
        except OSError as error:
            raise ValueError(f"--authorize {self.token_file}: {error.strerror}") from error
        except Exception as error:
            raise ValueError(f"--authorize {self.token_file} is not a token file, or damaged") from error
        if token.public_key != public_key_of(self.private_key):
            raise ValueError(f"--authorize {self.token_file}: the token is for another key than --identity_path")
        return token, organiser

    def objection(self, token: AccessToken) -> str:
        """Why a token does not make its holder a member; empty if it does."""
        content = _signed_part(token)  # not all of it: anybody can write the same token in many ways
        if content not in self._verified:
            if not self.organiser.verify(content, token.signature):
                return "is not signed by the run's organiser"
            if token.username.partition("/")[0] != self.run_id:
                return f"is for the run {token.username.partition('/')[0]}"
            self._verified[content] = float(token.expiration_time)
        if self._verified[content] < get_dht_time():
            return EXPIRED
        if fingerprint(token.public_key) in self.revocations.fingerprints:
            return REVOKED
        return ""

    def is_revoked(self, owner: bytes) -> bool:
        """Whether the owner of a DHT record (``[owner:PUBLIC KEY]``) was shut out."""
        keys = RSASignatureValidator._PUBLIC_KEY_RE.findall(owner)
        return any(fingerprint(key) in self.revocations.fingerprints for key in keys)

    def learn_revocations(self, signed: bytes) -> None:
        """Take over a list if it is the organiser's and newer."""
        if signed in (b"", self.revocations.signed):
            return
        news = read_revocations(signed, run_id=self.run_id, organiser=self.organiser)
        if news is not None and news.serial > self.revocations.serial:
            self.revocations = news

    def read_revocations_file(self) -> None:
        path = self.token_file.with_name(REVOCATIONS_FILE)
        if path.exists():
            self.learn_revocations(path.read_bytes())

    def renew_token(self) -> None:
        """Take a token with a later end from the file, if it is there by now."""
        try:
            token, organiser = self._read_token()
        except ValueError:
            return
        if organiser.to_bytes() == self.organiser.to_bytes() and not self.objection(token):
            self.token = token

    @property
    def members_key(self) -> str:
        return f"{self.run_id}_members"

    def record(self) -> list[bytes]:
        """What this member publishes under its key."""
        return [self.token.SerializeToString(), self.revocations.signed]

    def read_records(self, value) -> dict[PeerID, AccessToken]:
        """The organiser's tokens in what is stored under `members_key`, also those that have run out.

        Each in its holder's own record: another one could show a token that was renewed long ago. Learns revocations on
        the way.
        """
        tokens = {}
        for owner, entry in value.items() if isinstance(value, dict) else ():
            try:
                serialized, signed = entry.value
                token = AccessToken.FromString(serialized)
                self.learn_revocations(signed)
                peer = peer_of_key(token.public_key)
                if peer is not None and peer == peer_of(owner) and self.objection(token) in ("", EXPIRED, REVOKED):
                    tokens[PeerID(peer)] = token
            except Exception as error:  # whatever else a bad member stores there
                logger.debug("ignored a malformed member record: %r", error)
        return tokens


async def _update_authorizer(dht, node, revocations: bytes, token: bytes) -> None:
    """Runs in the DHT's process."""
    membership = node.protocol.authorizer.membership
    known = membership.revocations
    membership.learn_revocations(revocations)
    if membership.revocations is not known:
        for storage in (node.protocol.storage, node.protocol.cache):
            for key, (value, _) in list(storage.items()):
                if isinstance(value, DictionaryDHTValue):  # else it is no record of a peer
                    node.protocol._validate_dictionary(key.to_bytes(), value)  # keeps those of whoever may store them
    if token != membership.token.SerializeToString():
        membership.token = AccessToken.FromString(token)


class MembershipKeeper(threading.Thread):
    """Publishes this member's token again and again, and spreads the organiser's revocations."""

    def __init__(self, membership: Membership, dht: hivemind.DHT, owner: bytes):
        super().__init__(name="membership keeper", daemon=True)
        self.membership, self.dht, self.owner, self.problem = membership, dht, owner, ""

    def run(self) -> None:
        while True:
            time.sleep(PUBLISH_SECONDS)
            try:
                self.update()
            except Exception as error:
                logger.debug("could not publish the membership: %r", error)

    def update(self) -> None:
        """One round of news: file and members' records in, own record and the DHT's authorizer out."""
        membership = self.membership
        membership.renew_token()
        membership.read_revocations_file()
        self._say_if_shut_out(membership.objection(membership.token))
        self._wait(self.dht.store(
            membership.members_key,
            subkey=self.owner,
            value=membership.record(),
            expiration_time=get_dht_time() + EXPIRE_SECONDS,
            return_future=True,
        ))  # fmt: skip
        found = self._wait(self.dht.get(membership.members_key, latest=True, return_future=True))
        if found is not None:
            membership.read_records(found.value)
        signed, token = membership.revocations.signed, membership.token.SerializeToString()
        self._wait(self.dht.run_coroutine(partial(_update_authorizer, revocations=signed, token=token), True))

    def _say_if_shut_out(self, problem: str) -> None:
        if problem and problem != self.problem:
            file = self.membership.token_file
            logger.warning("this peer's token %s: no member answers it; put a new one in %s", problem, file)
        self.problem = problem

    @staticmethod
    def _wait(future):
        return future.result(timeout=15.0)  # never without: the DHT's process may have ended


@dataclass
class Identity:
    """The key of this peer, and its membership in a private run; ``lock`` is held as long as the peer lives."""

    private_key: RSAPrivateKey
    membership: Membership | None = None
    lock: int | None = field(default=None, repr=False)


def read_identity(peer: PeerArguments) -> Identity:
    """The key at ``identity_path``, which is made if it is absent; no path: a key for this process.

    Raises ValueError with one line if there is something else.
    """
    if peer.identity_path is None:
        return Identity(RSAPrivateKey.process_wide())
    path = Path(peer.identity_path).expanduser()
    if path.is_dir():
        raise ValueError(f"--identity_path: {path} is a directory; name a file in it, it is made if absent")
    if not path.exists():
        create_key(path)
    try:
        return Identity(load_key(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"--identity_path: {getattr(error, 'strerror', None) or error} ({path})") from error


def load_identity(peer: PeerArguments) -> Identity:
    """As `read_identity`, but also reads the token, and keeps the key from other processes.

    Raises ValueError with one line: no key, no token, or a running process that has the same identity.
    """
    if peer.identity_path is None:
        return read_identity(peer)
    path = Path(peer.identity_path).expanduser()
    if peer.token_file is not None and not path.exists():
        raise ValueError(f"--identity_path {path} does not exist; it must be the key that the token was issued for")
    identity = read_identity(peer)
    identity.lock = os.open(path, os.O_RDONLY)
    if not try_lock(identity.lock, path):
        os.close(identity.lock)
        raise ValueError(
            f"--identity_path {path}: a running peer on this machine has this identity; each needs its own"
        )
    if peer.token_file is not None:
        identity.membership = Membership(Path(peer.token_file).expanduser(), identity.private_key, peer.run_id)
    return identity
