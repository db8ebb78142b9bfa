"""What makes a peer the same one when its supervisor starts it again: its key, and the port that others know.

Who began a run, with a command that names no other peer, is found by the others at its old address, or not at all.
Both lie in the directory of its sockets, which lives as long as its supervisor. ``peer`` is a script's parsed class.
"""

import json

import hivemind

from arguments import PeerArguments
from src.process.sockets import socket_directory


def take_up_identity(peer: PeerArguments) -> None:
    """Let a peer without ``--identity_path`` have the key, and one with any free port the port, of its earlier life."""
    if peer.identity_path is None:
        peer.identity_path = str(socket_directory() / "identity.key")
    listening = socket_directory() / "listening.json"
    if listening.exists():
        peer.host_maddrs = json.loads(listening.read_text(encoding="utf-8"))


def keep_ports(peer: PeerArguments, dht: hivemind.DHT) -> None:
    """Write down where this peer listens, for its next life."""
    visible = [] if peer.is_client or peer.announce_maddrs else map(str, dht.get_visible_maddrs())
    ports = {address.split("/")[4] for address in visible if address.split("/")[3] == "tcp"}
    if len(ports) == 1:
        listening = [address.replace("/tcp/0", f"/tcp/{next(iter(ports))}") for address in peer.host_maddrs]
        (socket_directory() / "listening.json").write_text(json.dumps(listening), encoding="utf-8")
