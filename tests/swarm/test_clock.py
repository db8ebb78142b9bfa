"""A machine's clock that is set during a run disturbs nobody, and its owner hears of it."""

import threading
import time

import hivemind
import pytest

from src.access import ownership as records
from src.swarm import clock
from src.swarm.clock import ClockWatch, ask_time, swarm_time
from tests.reference.node import start_node

HOUR = 3600.0


@pytest.fixture
def machine(monkeypatch):
    """Sets the machine's clock by so many seconds, as hivemind and the watch would see it."""
    error = 0.0

    def set_clock(seconds):
        nonlocal error
        error += seconds

    true_time, offset = time.time, clock._offset.value
    monkeypatch.setattr(clock, "_machine_time", lambda: true_time() + error)
    yield set_clock
    clock._offset.value = offset


def watch(said: list[str], *, others_are_off_by=None) -> ClockWatch:
    """Asks two other peers, whose clocks are off; None: there is nobody."""
    errors = others_are_off_by
    others = [] if errors is None else [time.time() - time.monotonic() + error for error in errors]
    return ClockWatch(None, say=said.append, stop=threading.Event(), ask=lambda dht: others)


@pytest.mark.parametrize(("error", "words"), [(HOUR, "3600 s ahead of"), (-HOUR, "3600 s behind")])
def test_clock_that_is_set_wrong_is_said_once_and_not_followed(machine, error, words):
    said = []
    keeper = watch(said, others_are_off_by=[0.3, -0.3, -7000.0])
    keeper.look()
    assert said == []
    machine(error)
    keeper.look()
    keeper.look()
    assert len(said) == 1 and said[0].startswith(f"this machine's clock is {words} that of the other peers"), said
    assert abs(swarm_time() - time.time()) < 1.0
    machine(-error)
    keeper.look()
    keeper.look()
    assert said[1:] == ["this machine's clock is right again"]


def test_clock_that_others_agree_with_is_followed(machine):
    """As when a virtual machine was stopped for an hour, and its clock set when it went on."""
    said = []
    keeper = watch(said, others_are_off_by=[HOUR - 0.3, HOUR + 0.3])
    machine(HOUR)
    keeper.look()
    keeper.look()
    assert said == ["this machine's clock was set 3600 s forward, as that of the other peers: this peer goes by it"]
    assert abs(swarm_time() - time.time() - HOUR) < 1.0


def test_peer_that_is_alone_goes_by_its_machine_and_back_when_others_know_better(machine):
    said = []
    keeper = watch(said)
    machine(HOUR)
    keeper.look()
    assert said == [
        "this machine's clock was set 3600 s forward, and there is nobody else to ask: this peer goes by it"
    ]
    keeper.ask = watch([], others_are_off_by=[0.0]).ask
    keeper.look()
    assert said[1].startswith("this machine's clock was set 3600 s back, as that of the other peers")
    assert "3600 s ahead of that of the other peers" in said[2] and len(said) == 3
    assert abs(swarm_time() - time.time()) < 1.0


@pytest.mark.swarm
def test_hivemind_goes_by_the_swarm_s_time_in_all_its_processes(machine, shut_down_at_end):
    first = shut_down_at_end(start_node("run")[0])
    second = shut_down_at_end(start_node("run", first)[0])
    assert hivemind.utils.get_dht_time is records.get_dht_time is swarm_time
    assert ask_time(second) == pytest.approx([clock._offset.value], abs=1.0)
    clock._offset.value += 100.0  # of this process and, since it is shared, of the nodes'
    assert ask_time(second) == pytest.approx([clock._offset.value], abs=1.0)
