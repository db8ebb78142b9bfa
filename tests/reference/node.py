"""A DHT node on loopback as scripts start it: the key that signs its records is its identity."""

import hivemind
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments
from src.access.membership import Identity
from src.swarm.dht import start_dht

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def start_node(
    run_id: str, *known: hivemind.DHT, key: RSAPrivateKey | None = None, client_mode: bool = False
) -> tuple[hivemind.DHT, Identity]:
    """Joins at the ``known`` nodes. Without a key it gets one of its own, as if it were alone in its process."""
    identity = Identity(key or RSAPrivateKey())
    peer = PeerArguments(
        run_id=run_id,
        initial_peers=[str(address) for node in known for address in node.get_visible_maddrs()],
        host_maddrs=[] if client_mode else [LOOPBACK],
        client_mode=client_mode,
    )
    return start_dht(peer, identity)[0], identity
