"""The end of a run: a trainer shares the state of the last epoch until whoever stores checkpoints has stored it."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from src.swarm.dht import fetch_checkpoint_epochs
from src.swarm.join import Swarm

logger = logging.getLogger(__name__)

HAND_OVER_SECONDS = 60.0  # and three downloads more
USUAL_BANDWIDTH = 100.0  # Mbit/s, of a peer that does not say it
ANNOUNCE_SECONDS = 5.0  # between two reports that this trainer is there
LOOKS_BEFORE_LEAVING = 3  # a look into the DHT may find nothing although something is there
POLL_SECONDS = 0.5


def hand_over(
    swarm: Swarm, run_id: str, total_steps: int, *, limit: float, kept_in: Path, say: Callable, stop: threading.Event
) -> None:
    """Until each auxiliary peer that stores checkpoints has stored the state of epoch ``total_steps``.

    Waits for no other, not longer than ``limit`` seconds, and not after a stop.
    """
    asked, looks_in_vain = False, 0
    give_up_at, announce_at = time.monotonic() + limit, 0.0
    while not stop.is_set() and looks_in_vain < LOOKS_BEFORE_LEAVING:
        if time.monotonic() >= announce_at:
            _announce(swarm)
            announce_at = time.monotonic() + ANNOUNCE_SECONDS
        stored = _stored_epochs(swarm, run_id)
        if stored and min(stored) >= total_steps:
            say(f"the state of epoch {total_steps} is stored")
            return
        looks_in_vain = 0 if stored else looks_in_vain + 1
        if asked and looks_in_vain == LOOKS_BEFORE_LEAVING:
            say(f"nobody is left to store the state of the last epoch; it is in {kept_in}")
        if time.monotonic() >= give_up_at:
            say(
                f"nobody has stored the state of the last epoch within {limit:.0f} s; it is in {kept_in}. "
                "With the same flags this trainer hands it over again"
            )
            return
        if stored and not asked:
            asked = True
            say(f"the run is over: waiting until its state is stored, at most {limit:.0f} s (Ctrl+C: leave now)")
        stop.wait(POLL_SECONDS)


def hand_over_seconds(swarm: Swarm, parameters: list[torch.Tensor], bandwidth: float | None) -> float:
    """How long at most: for the looks, and for three downloads at ``bandwidth``, in Mbit/s."""
    statistics = swarm.optimizer.state_averager.optimizer.state.values()
    values = [value for of_one in statistics for value in of_one.values() if isinstance(value, torch.Tensor)]
    tensors = [*parameters, *values]
    megabits = sum(tensor.numel() * tensor.element_size() for tensor in tensors) * 8 / 1e6
    return HAND_OVER_SECONDS + 3 * megabits / (bandwidth or USUAL_BANDWIDTH)


def _announce(swarm: Swarm) -> None:
    """That this trainer is in the last epoch; hivemind reports none that has computed nothing since its start."""
    try:
        swarm.optimizer.tracker.announce()
    except Exception as error:  # the DHT may have ended
        logger.debug("could not announce the last epoch: %r", error)


def _stored_epochs(swarm: Swarm, run_id: str) -> list[int]:
    try:
        return list(fetch_checkpoint_epochs(swarm.dht, run_id).values())
    except Exception as error:  # the DHT may have ended
        logger.debug("could not look for checkpoints: %r", error)
        return []
