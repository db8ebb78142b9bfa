"""Peers in sessions of their own are out of reach of this program's signals, and still end with it."""

import pytest

from src.process.local_swarm import LocalPeer

REPORT = """
import ctypes, os
signal_number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(signal_number), 0, 0, 0)  # PR_GET_PDEATHSIG
print(os.getsid(0) == os.getpid(), signal_number.value)
"""


@pytest.mark.parametrize(("own_session", "expected"), [(True, "True 15"), (False, "False 0")])
def test_local_peer_in_a_session_of_its_own_gets_a_signal_when_this_program_ends(own_session, expected):
    peer = LocalPeer("peer", "-c", [REPORT], echo=False, own_session=own_session)
    assert peer.wait_for_line(expected, timeout=20)
    assert peer.stop() == 0


def test_local_peer_runs_behind_a_prefix():
    peer = LocalPeer("peer", "-c", ["import os; print(os.environ['COLOUR'])"], echo=False, prefix=["env", "COLOUR=red"])
    assert peer.wait_for_line("red", timeout=20)
