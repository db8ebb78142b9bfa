"""Private runs: an organiser signs who may join, offline; members check each other, and no server is needed.

One RSA key per peer is its libp2p identity, the owner of its DHT records, and what its token is issued for. The
transport proves that a caller holds the key its peer id derives from, so a token need not be kept secret.
"""

import asyncio
import base64
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hivemind
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, P2PHandlerError, PeerID
from hivemind.proto import crypto_pb2
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils import get_dht_time
from hivemind.utils.auth import AuthRole, AuthRPCWrapper, TokenAuthorizerBase
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from arguments import PeerArguments
from src.access.ownership import MAX_REMEMBERED, peer_of, peer_of_key
from src.files import try_lock

logger = logging.getLogger(__name__)

EXPIRED, REVOKED = "has expired", "was revoked"
REVOCATIONS_FILE = "revoked.txt"  # looked for beside the token
PUBLISH_SECONDS, EXPIRE_SECONDS = 20.0, 90.0  # a member's record in the DHT: how often renewed, how long valid
LOOK_UP_SECONDS, REFRESH_SECONDS = 1.0, 10.0  # look for an unknown caller at most this often; for news at least
PATIENCE_SECONDS = 2.0  # for which a known member waits for news


# -- keys -------------------------------------------------------------------------------------------------------------


def create_key(path: Path) -> RSAPrivateKey:
    """A new key in hivemind's identity format. Raises ValueError if there is such a file."""
    if path.exists():
        raise ValueError(f"{path} exists; a key is never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_key(path, key := RSAPrivateKey())
    return key


def write_key(path: Path, key: RSAPrivateKey) -> None:
    """A file that nobody else may read, not even while it is written; as `P2P.generate_identity` makes it."""
    content = crypto_pb2.PrivateKey(key_type=crypto_pb2.RSA, data=key.to_bytes()).SerializeToString()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
        file.write(content)


def load_key(path: Path) -> RSAPrivateKey:
    """Raises ValueError if the file is no key, OSError if it cannot be read."""
    try:
        content = crypto_pb2.PrivateKey.FromString(path.read_bytes()).data
        key = RSAPrivateKey.__new__(RSAPrivateKey)
        key.__setstate__({"_private_key": content})
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no private key; make one: python -m src.access key FILE") from error
    return key


def public_key_of(key: RSAPrivateKey) -> bytes:
    return key.get_public_key().to_bytes()


def fingerprint(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()


# -- what the organiser signs -----------------------------------------------------------------------------------------


def _signed_part(token: AccessToken) -> bytes:
    fields = ["LeanALBERT token", token.username, token.public_key.decode(errors="replace"), token.expiration_time]
    return json.dumps(fields).encode()


def sign_token(organiser: RSAPrivateKey, *, run_id: str, name: str, public_key: bytes, expires: float) -> AccessToken:
    """A token for the holder of ``public_key`` until ``expires`` (seconds since 1970)."""
    token = AccessToken(username=f"{run_id}/{name}", public_key=public_key, expiration_time=str(float(expires)))
    token.signature = organiser.sign(_signed_part(token))
    return token


def sign_revocations(organiser: RSAPrivateKey, *, run_id: str, serial: int, fingerprints: list[str]) -> bytes:
    """The list of keys that are no longer welcome; of two lists the one with the higher serial number counts."""
    content = json.dumps(["LeanALBERT revocations", run_id, serial, sorted(fingerprints)]).encode()
    return organiser.sign(content) + b"\n" + content


@dataclass(frozen=True)
class Revocations:
    """A verified list, as ``signed`` by the organiser."""

    serial: int = 0
    fingerprints: frozenset[str] = frozenset()
    signed: bytes = b""


def read_revocations(signed: bytes, *, run_id: str, organiser: RSAPublicKey) -> Revocations | None:
    """None if this is no list of the run's organiser."""
    signature, _, content = signed.partition(b"\n")
    if not organiser.verify(content, signature):
        return None
    kind, of_run, serial, fingerprints = json.loads(content)
    if kind != "LeanALBERT revocations" or of_run != run_id:
        return None
    return Revocations(serial, frozenset(fingerprints), signed)


def write_token_file(path: Path, token: AccessToken, organiser: RSAPublicKey) -> None:
    """A token with the public key of its organiser, which members trust."""
    content = {
        "issued_to": token.username,
        "expires": time.strftime("%Y-%m-%d %H:%M", time.localtime(float(token.expiration_time))),
        "token": base64.b64encode(token.SerializeToString()).decode(),
        "organiser": organiser.to_bytes().decode(),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# -- a peer's view of its run -----------------------------------------------------------------------------------------


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


class MemberAuthorizer(TokenAuthorizerBase):
    """Lets the DHT answer members only, and this peer take answers from members only."""

    def __init__(self, membership: Membership):
        super().__init__(membership.private_key)
        self.membership = membership

    async def get_token(self) -> AccessToken:
        return self.membership.token

    def is_token_valid(self, access_token: AccessToken) -> bool:
        return not self.membership.objection(access_token)

    def does_token_need_refreshing(self, access_token: AccessToken) -> bool:
        return access_token is not self.membership.token


class BoundToCaller(AuthRPCWrapper):
    """hivemind's, but a request counts only if the token's holder has sent it, and an answer likewise.

    hivemind 1.1.12 (utils/auth.py, `validate_request`) looks at the signature alone, which names neither side: whoever
    a member has asked may ask the next one with that request, and so read what members have stored, and take the
    member's place in the others' routing tables.
    """

    def __getattribute__(self, name: str):
        method = super().__getattribute__(name)
        if not name.startswith("rpc_") or self._authorizer is None:
            return method

        async def answer(request, context):
            return (
                await method(request, context) if _holds(context.remote_id, request.auth.client_access_token) else None
            )

        async def call(request, *args, **kwargs):
            response = await method(request, *args, **kwargs)
            is_own = response is not None and _holds(self._stub._peer, response.auth.service_access_token)
            return response if is_own else None

        return answer if self._role == AuthRole.SERVICER else call


def _holds(peer: PeerID, token: AccessToken) -> bool:
    return peer_of_key(token.public_key) == peer.to_bytes()


def bind_requests_to_callers() -> None:
    """In the node that is started next in this process; to be called before its own is forked."""
    hivemind.dht.protocol.AuthRPCWrapper = BoundToCaller


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


class MemberGate:
    """Tells a process that answers remote calls whether a peer may call and be called.

    ``look_up(key)`` gets what the DHT has under a key, ``on_refusal(peer, reason)`` is called
    once for each peer and reason.
    """

    def __init__(
        self, membership: Membership, look_up: Callable[[str], Awaitable], on_refusal: Callable[[PeerID, str], None]
    ):
        self.membership, self.look_up, self.on_refusal = membership, look_up, on_refusal
        self.tokens: dict[PeerID, AccessToken] = {}
        self.looked_at, self._looking = -float("inf"), asyncio.Lock()
        self._next_look: asyncio.Task | None = None
        self._refused: set[tuple[PeerID, str]] = set()

    async def objection(self, peer: PeerID) -> str:
        """Why a peer is no member; empty if it is one. Looks into the DHT at most once a second.

        Strangers wait for one look together, however many they are, and a known member for none of them.
        """
        if peer not in self.tokens:  # perhaps it has just joined
            await asyncio.shield(self._look_soon())
        elif time.monotonic() - self.looked_at > REFRESH_SECONDS:
            await asyncio.wait([self._look_soon()], timeout=PATIENCE_SECONDS)
        token = self.tokens.get(peer)
        objection = "has shown no valid token" if token is None else self.membership.objection(token)
        if objection and (peer, objection) not in self._refused:
            if len(self._refused) >= MAX_REMEMBERED:
                self._refused.pop()
            self._refused.add((peer, objection))
            self.on_refusal(peer, objection if token is None else f"its token {objection}")
        return objection

    def _look_soon(self) -> asyncio.Task:
        """The look that begins next, when one may look again: the same for all who ask before it begins."""
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look_when_allowed())
        return self._next_look

    async def _look_when_allowed(self) -> None:
        async with self._looking:
            await asyncio.sleep(self.looked_at + LOOK_UP_SECONDS - time.monotonic())
            self._next_look = None  # who asks from now on may have joined since
            await self._look_up()

    async def _look_up(self) -> None:
        self.looked_at = time.monotonic()
        try:
            found = await asyncio.wait_for(self.look_up(self.membership.members_key), timeout=10.0)
        except Exception as error:
            logger.debug("could not look up the members: %r", error)
            return
        if found is not None:
            self.tokens.update(self.membership.read_records(found.value))


class GatedStub:
    """Calls a peer only if it is a member: nobody else may be leader, reducer or donor."""

    def __init__(self, stub, peer: PeerID, gate: MemberGate):
        self.stub, self.peer, self.gate = stub, peer, gate

    def __getattr__(self, name: str):
        method = getattr(self.stub, name)

        async def call(*args, **kwargs):
            objection = await self.gate.objection(self.peer)
            if objection:
                raise P2PHandlerError(f"did not call {self.peer}: it {objection}")
            return await method(*args, **kwargs)

        return call


class Gated:
    """Mixin for a servicer whose calls, in both directions, are for the members of a private run only.

    ``_gate`` is set on the class, in the process that answers, which holds one servicer of it; None: an open run.
    """

    _gate: MemberGate | None = None

    async def _admits(self, peer: PeerID) -> bool:
        return self._gate is None or not await self._gate.objection(peer)

    @classmethod
    def get_stub(cls, p2p: P2P, peer: PeerID, *, namespace: str | None = None):
        stub = super().get_stub(p2p, peer, namespace=namespace)
        return stub if cls._gate is None else GatedStub(stub, peer, cls._gate)


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


# -- who this peer is -------------------------------------------------------------------------------------------------


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
