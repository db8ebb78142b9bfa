"""How a state leaves a swarm in which nobody can be called: clients hand it to those whom they have called.

Nobody can connect to a client, but a connection that it has made carries calls in both directions. So an auxiliary peer
takes the state from one of the clients that it is connected with, as from any donor and as well checked, with others as
witnesses, keeps it for the checkpoint, and hands it on to whoever joins. hivemind 1.1.12 lets no client share its state
(averager.py, `allow_state_sharing`), so that a swarm of clients has none to give.
"""

import asyncio
import contextlib
import logging

from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

logger = logging.getLogger(__name__)

OF_CLIENT = "rpc_download_state", "rpc_resume_state", "rpc_sample_state"  # what a client answers
RENEW_SHARE = 0.7  # of the time for which an offer holds


class ClientState:
    """Mixin for a `TrainingStateAverager`: the side of the client, and finding those who have one."""

    def offer_state(self, epoch: int) -> None:
        """As a client: whoever this peer has called may take its state from now on, which is that of ``epoch``."""
        self._state_sharing_priority.value = epoch
        is_new = not self.allow_state_sharing
        self._allow_state_sharing.value = True
        self._outer_pipe.send(("_answer_as_client" if is_new else "_trigger_declare_load_state", [], {}))

    # -- in the averager's process

    @property
    def _clients_key(self) -> str:
        return f"{self._matchmaking.group_key_manager.prefix}.all_clients"

    async def _answer_as_client(self) -> None:
        """Answer for the state, and nothing else; tell the swarm that it can be had."""
        self._collect_rpc_handlers()
        for handler in self._rpc_handlers:
            if handler.method_name in OF_CLIENT:
                await self._p2p.add_protobuf_handler(
                    self._get_handle_name(self.prefix, handler.method_name),
                    getattr(self, handler.method_name),
                    handler.request_type,
                    stream_input=handler.stream_input,
                    stream_output=handler.stream_output,
                )
        while True:
            try:
                await asyncio.wait_for(self._tell_offer(), self.declare_state_period)
            except Exception as error:  # the DHT may be about to end
                logger.debug("could not offer the state: %r", error)
            self._state_updated.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._state_updated.wait(), RENEW_SHARE * self.declare_state_period)

    async def _tell_offer(self) -> None:
        await self.dht.store(
            self._clients_key,
            subkey=self.peer_id.to_bytes(),
            value=self.state_sharing_priority,
            expiration_time=get_dht_time() + self.declare_state_period,
            return_future=True,
        )

    async def _is_connected_with(self) -> set[PeerID]:
        return {peer.peer_id for peer in await self._p2p.list_peers()}
