"""What a peer says when it has become part of its run, and what it watches from then on."""

import threading
from collections.abc import Callable, Iterable

from arguments import PeerArguments
from src.metrics.console import Progress, Pulse
from src.process.supervisor import install_stop_handler
from src.settings.manifest import Manifest
from src.swarm.clock import ClockWatch
from src.swarm.dht import addresses_for_others
from src.swarm.join import Swarm, how_to_join
from src.swarm.reach import describe_first
from src.swarm.reconnect import KeepInTouch

STOP_SECONDS = 25.0  # to leave the swarm in order after a stop


def go_to_work(
    swarm: Swarm,
    peer: PeerArguments,
    *,
    manifest: Manifest | None,
    total_epochs: int,
    introduce: Callable[[list[str], str], Iterable[str]],
    progress: Progress,
    stop: threading.Event,
) -> None:
    """From here on the peer can be stopped in order, looks at its clock, tells how it goes, and finds its run again.

    ``introduce(addresses, joining)``: what it says of itself, line by line; ``joining`` is the command for others.
    """
    # now, because hivemind has replaced the handlers
    install_stop_handler(stop.set, swarm.optimizer.stop_waiting, deadline_seconds=STOP_SECONDS)
    addresses = addresses_for_others(swarm.dht, peer)
    if not peer.initial_peers:
        progress.say(describe_first(addresses))
    for line in introduce(addresses, how_to_join(peer, addresses, manifest)):
        progress.say(line)
    ClockWatch(swarm.dht, say=progress.say, stop=stop).start()
    Pulse(progress, swarm.optimizer, total_epochs=total_epochs, stop=stop).start()
    if not peer.use_ipfs:
        KeepInTouch(swarm.dht, peer.initial_peers, stop=stop).start()
