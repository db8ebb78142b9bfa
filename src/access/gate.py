"""Only members of a private run may call, and are called: in the DHT, and in averaging."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import hivemind
from hivemind.p2p import P2P, P2PHandlerError, PeerID
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.auth import AuthRole, AuthRPCWrapper, TokenAuthorizerBase

from src.access.membership import Membership
from src.access.ownership import MAX_REMEMBERED, peer_of_key

logger = logging.getLogger(__name__)


LOOK_UP_SECONDS, REFRESH_SECONDS = 1.0, 10.0  # look for an unknown caller at most this often; for news at least
PATIENCE_SECONDS = 2.0  # for which a known member waits for news


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
