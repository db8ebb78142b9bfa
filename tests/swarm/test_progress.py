"""A trainer that has fallen silent is no partner and brings no samples; one that is only slow still counts."""

import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest
from hivemind.p2p import PeerID
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from src.access.ownership import name_of
from src.swarm import progress
from src.swarm.progress import SILENT_SECONDS, LeanProgressTracker


class SilentDHT:
    """A DHT without any record but those in ``records``."""

    peer_id, client_mode = PeerID(b"own peer"), False

    def __init__(self):
        self.records = {}

    def get(self, *args, **kwargs):
        return SimpleNamespace(value=dict(self.records)) if self.records else None

    def store(self, key, subkey, value, expiration_time):
        self.records[subkey] = ValueWithExpiration(value, expiration_time)

    def add_validators(self, validators):
        pass


@pytest.fixture
def tracker():
    """A tracker without thread that has accumulated 10 of 100 samples in epoch 4."""
    vain_search = multiprocessing.Value("d", float("-inf"))
    tracker = LeanProgressTracker(SilentDHT(), "run", 100, start=False, vain_search=vain_search)
    tracker._local_public_key = b"own"
    tracker.report_local_progress(4, 10)
    return tracker


def report(
    peer: bytes, *, at: float, samples: int = 10, rate: float = 5.0, stored: float | None = None
) -> ValueWithExpiration:
    """``at``: when its trainer finished a batch; ``stored``: when it was last stored, by default just now."""
    value = {"peer_id": peer, "epoch": 4, "samples_accumulated": samples, "samples_per_second": rate, "time": at,
             "client_mode": False}  # fmt: skip
    return ValueWithExpiration(value, (get_dht_time() if stored is None else stored) + 30)


def seen(tracker, *, own: float, other: float, now: float):
    """Who counts, by when reports were stored; what they say is the same all the time."""
    reports = {
        b"own": report(b"own", at=1000.0, stored=own),
        b"other": report(b"other", at=1000.0, samples=40, stored=other),
    }
    return set(tracker._of_live_peers(reports, now))


def test_trainer_that_computes_for_minutes_counts_as_long_as_it_renews_its_report(tracker):
    for second in range(0, 600, 7):
        assert b"other" in seen(tracker, own=1000.0, other=1000.0 + second, now=50.0 + second)
    batch_ago = report(b"other", at=get_dht_time() - 600.0, samples=40)
    seen_by_tracker = tracker._parse_swarm_progress_data(
        {b"own": report(b"own", at=get_dht_time()), b"other": batch_ago}
    )
    assert (seen_by_tracker.num_peers, seen_by_tracker.samples_accumulated) == (2, 50)


def test_report_is_renewed_although_nothing_happens(tracker, monkeypatch):
    monkeypatch.setattr(progress, "RENEW_SECONDS", 0.05)
    tracker.should_report_progress.clear()
    heart = threading.Thread(target=tracker._renew_report, daemon=True)
    heart.start()
    assert tracker.should_report_progress.wait(5), "hivemind's thread publishes on this"
    tracker.shutdown_triggered.set()
    heart.join(5)
    assert not heart.is_alive()


def test_trainer_that_does_not_renew_its_report_counts_no_longer(tracker):
    assert seen(tracker, own=1000.0, other=1000.0, now=50.0) == {b"own", b"other"}
    assert seen(tracker, own=1009.0, other=1000.0, now=50.0 + SILENT_SECONDS - 1) == {b"own", b"other"}
    assert seen(tracker, own=1009.0, other=1000.0, now=50.0 + SILENT_SECONDS + 1) == {b"own"}, "this peer always counts"
    assert seen(tracker, own=1009.0, other=1030.0, now=90.0) == {b"own", b"other"}


def test_clock_of_another_peer_does_not_matter(tracker):
    for wrong_by in (-3000.0, 3000.0):
        for now in range(0, 200, 10):
            assert b"other" in seen(tracker, own=now, other=now + wrong_by, now=float(now))


def test_nobody_counts_after_a_vain_search_until_it_reports_again(tracker):
    assert seen(tracker, own=1000.0, other=1000.0, now=50.0) == {b"own", b"other"}
    tracker._vain_search.value = 52.0
    assert seen(tracker, own=1003.0, other=1000.0, now=53.0) == {b"own"}
    assert seen(tracker, own=1003.0, other=1003.5, now=54.0) == {b"own", b"other"}


def test_silent_trainer_is_left_out_of_the_swarms_progress(tracker):
    reports = {
        b"own": report(b"own", at=get_dht_time()),
        b"other": report(b"other", at=get_dht_time(), samples=40, rate=20.0),
    }
    both = tracker._parse_swarm_progress_data(reports)
    assert (both.num_peers, both.samples_accumulated) == (2, 50)
    tracker._vain_search.value = time.monotonic()
    alone = tracker._parse_swarm_progress_data(reports)
    assert (alone.num_peers, alone.samples_accumulated) == (1, 10)
    assert alone.eta_next_epoch > both.eta_next_epoch + 5, "its rate is not counted on, either"
    assert tracker._parse_swarm_progress_data(None).num_peers == 0


def test_trainer_that_announces_itself_is_counted_before_its_first_samples(tracker):
    tracker.report_local_progress(4, 0)
    tracker.announce()
    assert tracker.global_progress.num_peers == 1
    first = tracker.dht.records[b"own"].value
    assert (first["epoch"], first["samples_accumulated"]) == (4, 0)
    tracker.dht.records[b"other"] = report(b"other", at=get_dht_time(), samples=0)
    tracker.announce()
    assert tracker.global_progress.num_peers == 2, "and it knows at once who else is there"
    assert tracker.dht.records[b"own"].value["time"] > first["time"], "or it would seem to have fallen silent"


@pytest.fixture
def publishes(monkeypatch):
    """Reports `publishes(epoch, samples, at=second)` to a tracker as if it ran; returns whether that is published."""
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    vain_search = multiprocessing.Value("d", float("-inf"))
    tracker = LeanProgressTracker(SilentDHT(), "run", 100, start=True, vain_search=vain_search)

    def report_and_see(epoch: int, samples: int, *, at: float) -> bool:
        clock[0] = at
        tracker.report_local_progress(epoch, samples)
        assert tracker.local_progress.samples_accumulated == samples, "this peer itself always knows"
        is_published = tracker.should_report_progress.is_set()
        tracker.should_report_progress.clear()  # as the thread that publishes does
        return is_published

    return report_and_see


def test_samples_are_published_once_a_second_and_whatever_else_happens_at_once(publishes):
    assert publishes(0, 4, at=10.0), "the first samples"
    assert not publishes(0, 8, at=10.2)
    assert not publishes(0, 12, at=10.9)
    assert publishes(0, 16, at=11.1)
    assert not publishes(0, 20, at=11.2)
    assert publishes(1, 0, at=11.3), "a new epoch"
    assert publishes(1, 4, at=11.4), "its first samples"
    assert not publishes(1, 8, at=11.5)
    assert publishes(1, 4, at=11.6), "samples that were given up"


def test_what_is_remembered_of_reports_is_bounded(tracker, monkeypatch):
    monkeypatch.setattr(progress, "MAX_REMEMBERED", 50)
    for number in range(200):
        tracker._of_live_peers({b"own": report(b"own", at=0.0), b"%d" % number: report(b"x", at=0.0)}, 50.0)
    assert len(tracker._reports) <= 51


def test_only_trainers_that_answer_or_are_clients_are_present(tracker):
    keys = [b"[owner:" + RSAPrivateKey().get_public_key().to_bytes() + b"]" for _ in range(3)]
    there, _, client = keys
    tracker._reachable = lambda names: set(names) & {name_of(there)}
    assert tracker.num_present() == 1
    now = get_dht_time()
    records = {key: report(b"x", at=now) for key in (b"own", *keys)}
    records[client].value["client_mode"] = True
    tracker._parse_swarm_progress_data(records)
    assert tracker.global_progress is not None and tracker.num_present() == 3, "all but the phantom"
    del records[there]
    tracker._parse_swarm_progress_data(records)
    assert tracker.num_present() == 2
