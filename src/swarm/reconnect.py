"""Find each other again after an outage: peers greet the addresses they were started with, now and then.

hivemind's DHT forgets a peer that does not answer and never looks for it again. An auxiliary peer that restarts with
its old command, which names no other peer, would then be alone, and whoever joins at its address with it; two halves of
a swarm would not meet again after a cable was cut.
"""

import asyncio
import logging
import threading
from functools import partial

import hivemind
from hivemind.dht import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

PERIOD_SECONDS, CONNECT_TIMEOUT, GREETING_TIMEOUT = 10.0, 5.0, 60.0


class KeepInTouch(threading.Thread):
    """Greets ``addresses`` (with peer ids) every ``period`` seconds until ``stop`` is set; silent about failures."""

    def __init__(
        self, dht: hivemind.DHT, addresses: list[str], *, stop: threading.Event, period: float = PERIOD_SECONDS
    ):
        super().__init__(name="keep in touch", daemon=True)
        self.dht, self.addresses, self.stop, self.period = dht, addresses, stop, period

    def run(self) -> None:
        while self.addresses and not self.stop.wait(self.period):
            try:  # the DHT may be shut down at any moment
                greeting = self.dht.run_coroutine(partial(greet, addresses=self.addresses), return_future=True)
                greeting.result(GREETING_TIMEOUT)
            except Exception as error:
                logger.debug("could not greet %s: %r", self.addresses, error)


async def greet(_dht: hivemind.DHT, node: DHTNode, *, addresses: list[str]) -> int:
    """Connect to each address and make its peer and this one know each other; returns how many answered.

    Runs in the DHT's own process.
    """
    answered = 0
    for address in map(Multiaddr, addresses):
        peer_id = PeerID.from_base58(address["p2p"])
        if peer_id == node.peer_id:
            continue
        try:
            where = address.decapsulate(f"/p2p/{address['p2p']}")
            await asyncio.wait_for(node.p2p._client.connect(peer_id, [where]), CONNECT_TIMEOUT)
        except Exception as error:  # one that is down must not keep us from the others
            logger.debug("cannot connect to %s: %r", address, error)
            continue
        if await node.protocol.call_ping(peer_id) is not None:
            node.blacklist.register_success(peer_id)
            answered += 1
    return answered
