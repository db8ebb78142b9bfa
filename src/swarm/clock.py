"""The swarm's time, which does not jump when somebody sets this machine's clock.

Whatever is stored in the DHT expires at a time of day, and the peers' clocks must agree within seconds. hivemind 1.1.12
reads the machine's clock at each use. When that is set wrong during a run, a peer takes all records for outdated, and
trains alone without a word; its own records outlive the mistake by as much as the clock was ahead.

So a peer goes on by the time of its start. When its machine's clock departs from that, it asks others what time it is:
the machine may have slept, and its clock be right again.
"""

import asyncio
import logging
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Callable
from statistics import median

import hivemind
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

logger = logging.getLogger(__name__)

PERIOD_SECONDS, ANSWER_SECONDS, MAX_ASKED = 5.0, 5.0, 9
TOLERANCE = 2.0  # seconds; hivemind lets nobody join whose clock is off by more than three

_machine_time = time.time
# What `time.monotonic` lacks to the swarm's time. Shared with the processes that are forked from this one.
_offset = multiprocessing.RawValue("d", _machine_time() - time.monotonic())


def swarm_time() -> float:
    """Seconds since 1970, by the clock of this machine as it was when this peer started."""
    return time.monotonic() + _offset.value


def keep_time() -> None:
    """From now on let hivemind, and all that asks it for the time, go by `swarm_time`.

    To be called before hivemind's processes are forked, and when all modules that ask for the time are loaded.
    """
    _offset.value = _machine_time() - time.monotonic()
    for name, module in list(sys.modules.items()):
        if name.startswith(("hivemind", "src.")) and vars(module).get("get_dht_time") is time.time:
            module.get_dht_time = swarm_time


async def _ask_time(dht: hivemind.DHT, node) -> list[float]:
    async def ask(peer: PeerID) -> float | None:
        try:
            stub, asked_at = node.protocol.get_stub(peer), time.monotonic()
            answer = await asyncio.wait_for(stub.rpc_ping(dht_pb2.PingRequest()), ANSWER_SECONDS)
            return answer.dht_time - (asked_at + time.monotonic()) / 2 if answer.dht_time > 0 else None
        except Exception as error:  # it is not there, or whatever it answers
            logger.debug("no time from %s: %r", peer, error)
            return None

    known = list(node.protocol.routing_table.peer_id_to_uid)
    answers = await asyncio.gather(*map(ask, random.sample(known, min(MAX_ASKED, len(known)))))
    return [answer for answer in answers if answer is not None]


def ask_time(dht: hivemind.DHT) -> list[float]:
    """What `time.monotonic` of this machine lacks to the time of some peers."""
    return dht.run_coroutine(_ask_time, return_future=True).result(2 * ANSWER_SECONDS)


class ClockWatch(threading.Thread):
    """Says when this machine's clock departs from the swarm's time, and follows it if the other peers agree with it.

    They can only choose between two times that this machine's clock has given; without others, it is right.
    """

    def __init__(
        self,
        dht: hivemind.DHT,
        *,
        say: Callable[[str], None],
        stop: threading.Event,
        ask: Callable[[hivemind.DHT], list[float]] = ask_time,
        period: float = PERIOD_SECONDS,
    ):
        super().__init__(name="clock watch", daemon=True)
        self.dht, self.say, self.stop, self.ask, self.period = dht, say, stop, ask, period
        self._earlier = _offset.value  # to go back to, if the clock was followed when nobody could be asked
        self._said: float | None = None

    def run(self) -> None:
        while not self.stop.wait(self.period):
            try:  # the DHT may be shut down at any moment
                self.look()
            except Exception as error:
                logger.debug("could not compare clocks: %r", error)

    def look(self) -> None:
        machine, now = _machine_time() - time.monotonic(), _offset.value
        if max(abs(machine - now), abs(self._earlier - now)) > TOLERANCE:
            self._choose(machine, now)
        error = machine - _offset.value
        if abs(error) <= TOLERANCE:
            if self._said is not None:
                self.say("this machine's clock is right again")
            self._said = None
        elif self._said is None or abs(error - self._said) > TOLERANCE:
            self._said = error
            self.say(
                f"this machine's clock is {abs(error):.0f} s {'ahead of' if error > 0 else 'behind'} that of the other "
                "peers, since somebody has set it; training goes on by the right time, which a new start would not "
                "know: set the clock (`timedatectl set-ntp true`)"
            )

    def _choose(self, machine: float, now: float) -> None:
        others = self.ask(self.dht)
        right = min((now, machine, self._earlier), key=lambda time: abs(time - median(others))) if others else machine
        if others:
            self._earlier = right
        if abs(right - now) > TOLERANCE:
            _offset.value = right
            agree = "as that of the other peers" if others else "and there is nobody else to ask"
            self.say(f"this machine's clock was set {abs(right - now):.0f} s {'forward' if right > now else 'back'}, "
                     f"{agree}: this peer goes by it")  # fmt: skip
