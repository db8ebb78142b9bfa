"""Nobody can push a swarm forward, stop it, or end its epochs early by what he claims."""

import time
from types import SimpleNamespace

import hivemind
import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.optim.progress_tracker import LocalTrainingProgress
from hivemind.p2p import PeerID
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from src.access.ownership import name_of
from src.auxiliary.monitor import MetricsMonitor
from src.swarm.claims import MAX_REFUSALS, BoundedProgressTracker
from src.swarm.dht import TrainerMetrics
from src.swarm.optimizer import LeanOptimizer
from src.swarm.patience import Patience
from tests.reference.node import start_node

TARGET = 1000


class SilentDHT:
    """Holds no records and takes none."""

    client_mode = False
    peer_id = PeerID(b"own")

    def add_validators(self, validators):
        pass

    def get(self, key, latest):
        return None


def bare_tracker(*, epoch: int = 0, seconds_per_epoch: float = 10.0, **kwargs) -> BoundedProgressTracker:
    """A tracker without network; one that is in an ``epoch`` above 0 has trained the one before."""
    tracker = BoundedProgressTracker(SilentDHT(), "run", TARGET, start=False, private_key=RSAPrivateKey(), **kwargs)
    if epoch > 0:
        tracker.report_local_progress(epoch - 1, 10)
        tracker.epoch_since -= seconds_per_epoch
        tracker.report_local_progress(epoch, 0)
    return tracker


def parse(tracker: BoundedProgressTracker, **records):
    """What the tracker makes of its own record and these of others, each a dictionary of changes."""
    own = tracker.local_progress.dict()
    entries = {tracker._local_public_key: own}
    for name, changes in records.items():
        entries[name.encode()] = {**own, "peer_id": name.encode(), **changes} if isinstance(changes, dict) else changes
    expiration = get_dht_time() + 30
    return tracker._parse_swarm_progress_data(
        {owner: ValueWithExpiration(value, expiration) for owner, value in entries.items()}
    )


def owner_of(key: RSAPrivateKey) -> bytes:
    return RSASignatureValidator(key).local_public_key


FORGED = {
    "an epoch far ahead": {"epoch": 10**6},
    "an epoch three ahead": {"epoch": 8},
    "a trillion samples": {"samples_accumulated": 10**12},
    "a clock far back": {"time": 0.0, "samples_per_second": 5.0},
    "a clock far ahead": {"time": get_dht_time() + 10_000},
    "no record": "text",
    "negative samples": {"samples_accumulated": -1},
    "an infinite speed": {"samples_per_second": float("inf")},
}


def test_the_speed_of_all_trainers_counts_nobodys_beyond_what_is_possible():
    tracker = bare_tracker(epoch=5)
    parse(tracker, one={"samples_per_second": 20.0}, other={"samples_per_second": 1e9})
    assert 20.0 < tracker.samples_per_second < 20.0 + 2.1 * TARGET / tracker._fastest_epoch()  # its own is bounded, too


@pytest.mark.parametrize("kind", FORGED)
def test_forged_record_counts_for_nothing_and_its_peer_is_named_once(kind):
    tracker = bare_tracker(epoch=5)
    for _ in range(2):
        progress = parse(tracker, honest={"samples_accumulated": 30}, forger=FORGED[kind])
        assert (progress.epoch, progress.samples_accumulated, progress.num_peers) == (5, 30, 2)
    assert not tracker.ready_to_update_epoch
    refusals = tracker.take_refusals()
    assert len(refusals) == 1 and all(reason for reason in refusals.values()), refusals
    assert tracker.take_refusals() == {}


def test_speed_beyond_what_the_swarm_can_do_is_capped():
    tracker = bare_tracker(epoch=5, seconds_per_epoch=10.0)
    progress = parse(tracker, forger={"samples_per_second": 1e9})
    assert progress.eta_next_epoch - get_dht_time() > 1.0  # both peers four times as quick as the swarm is


def test_samples_beyond_the_target_count_as_the_target():
    progress = parse(bare_tracker(epoch=5), fast={"samples_accumulated": 1200})
    assert progress.samples_accumulated == TARGET


def test_next_epoch_is_believed_at_once_and_later_ones_when_time_has_passed():
    tracker = bare_tracker(epoch=5, seconds_per_epoch=10.0)
    assert parse(tracker, other={"epoch": 6}).epoch == 6
    assert parse(tracker, other={"epoch": 9}).epoch == 5
    tracker.epoch_since -= 10.0  # as after a pause; others may be four times as quick as this peer was
    assert parse(tracker, other={"epoch": 10}).epoch == 10
    assert parse(tracker, other={"epoch": 11}).epoch == 5


@pytest.mark.parametrize("forgers", [1, 3, 50])
def test_newcomer_that_knows_nothing_believes_the_lowest_claim_however_many_keys_others_have(forgers):
    assert parse(bare_tracker(), one={"epoch": 500}).epoch == 500
    assert parse(bare_tracker(), one={"epoch": 500}, other={"epoch": 501}).epoch == 501
    tracker, fakes = bare_tracker(), {f"forger{number}": {"epoch": 10**12} for number in range(forgers)}
    progress = parse(tracker, **fakes, one={"epoch": 500}, other={"epoch": 499})
    assert (progress.epoch, progress.num_peers) == (500, 3), "both honest ones, and itself"
    assert tracker.take_refusals() == {}, "perhaps the others are behind"
    assert parse(bare_tracker(), newcomer={"epoch": 0}, one={"epoch": 500}).epoch == 500
    assert parse(bare_tracker(), starter={"epoch": 0, "samples_accumulated": 3}).epoch == 0


@pytest.mark.parametrize("forgers", [1, 3, 50])
def test_newcomer_goes_by_what_the_peers_of_its_choice_say(forgers):
    """Also against low claims, with which a newcomer would train alone from the beginning."""
    tracker = bare_tracker(ask_epoch=lambda: (500, 2.0))
    fakes = {f"forger{number}": {"epoch": 10**12 if number % 2 else 3} for number in range(forgers)}
    assert parse(tracker, **fakes, one={"epoch": 502}, other={"epoch": 503}).epoch == 503
    assert all("epoch 1000000000000" in reason for reason in tracker.take_refusals().values())


def test_newcomer_whose_chosen_peers_are_out_of_date_still_finds_the_swarm():
    tracker = bare_tracker(ask_epoch=lambda: (500, 600.0))
    assert parse(tracker, one={"epoch": 900}, other={"epoch": 900}).epoch == 900
    assert tracker.take_refusals() == {}
    rewound = bare_tracker(ask_epoch=lambda: (500, 0.0))
    assert parse(rewound, one={"epoch": 100}, other={"epoch": 101}).epoch == 101, "all have gone back to a backup"


def test_newcomer_that_has_taken_the_state_of_the_swarm_is_not_held_back_by_a_slow_trainer():
    tracker = bare_tracker()
    tracker.report_local_progress(500, 0)  # a state that was checked, while one trainer computes a batch for minutes
    assert not tracker.has_trained
    slow = {"epoch": 480, "samples_accumulated": 3}
    progress = parse(tracker, slow=slow, one={"epoch": 500, "samples_accumulated": 30}, other={"epoch": 501})
    assert (progress.epoch, progress.num_peers) == (501, 4)


def test_rounds_and_states_bear_out_what_is_believed_and_nothing_else():
    tracker = bare_tracker()
    assert tracker.known_epoch() is None
    parse(tracker, one={"epoch": 500})
    tracker.learn_epoch(10**12)
    assert tracker.known_epoch() is None
    tracker.learn_epoch(500)
    assert tracker.known_epoch()[0] == 500 and tracker.known_epoch()[1] < 1.0
    assert parse(tracker, one={"epoch": 501}, forger={"epoch": 10**6}, low={"epoch": 7}).epoch == 501
    tracker.learn_epoch(7)
    assert tracker.known_epoch()[0] == 500


def test_trainer_says_its_own_epoch_when_it_is_asked():
    tracker = bare_tracker(epoch=5)
    parse(tracker, other={"epoch": 6})
    assert tracker.known_epoch()[0] == 5
    tracker.learn_epoch(6)
    assert tracker.known_epoch()[0] == 5


def test_trainer_far_behind_believes_what_the_peers_of_its_choice_bear_out_and_nothing_beyond():
    """After a cut, or when a swarm of the same name is met: its own epochs say nothing of the others'."""
    answers = []
    tracker = bare_tracker(epoch=5, ask_epoch=lambda: answers.append((50, 1.0)) or answers[-1])
    asked = len(answers)
    tracker.ask_for_epoch()
    assert len(answers) == asked, "who is with the swarm asks nobody"
    assert parse(tracker, other={"epoch": 51}, forger={"epoch": 10**6}).epoch == 5
    tracker.ask_for_epoch()
    tracker.global_progress = parse(tracker, other={"epoch": 51}, forger={"epoch": 10**6})
    assert tracker.global_epoch == 51 and tracker.is_apart
    tracker.report_local_progress(51, 0)
    tracker.global_progress = parse(tracker, other={"epoch": 51})
    assert not tracker.is_apart
    tracker.ask_for_epoch()
    assert tracker.told is None and parse(tracker, other={"epoch": 54}).epoch == 51


def test_trainer_that_has_chosen_no_peers_is_told_how_to_join_a_swarm_far_ahead():
    tracker = bare_tracker(epoch=5)
    assert parse(tracker, other={"epoch": 50}).epoch == 5
    tracker.ask_for_epoch()
    tracker.learn_epoch(50)  # whoever claims much can also come to a round
    assert parse(tracker, other={"epoch": 50}).epoch == 5 and not tracker.is_apart
    (reason,) = tracker.take_refusals().values()
    assert reason.startswith("it claims epoch 50; at most 6 is possible; if there is a swarm that far, join it: --init")


def test_what_is_remembered_and_said_of_liars_is_bounded(monkeypatch):
    monkeypatch.setattr("src.swarm.claims.MAX_REMEMBERED", 50)
    monkeypatch.setattr("src.swarm.claims._name", bytes.hex)  # each has a key, which takes long to make
    tracker = bare_tracker(epoch=5)
    for number in range(200):
        liar = b"liar%d" % number
        tracker._refuse(liar, "epoch", "it lies")
        tracker.last_claims = {liar: 99}
        tracker.distrust_claims_above(6)
        assert len(tracker.refusals) <= MAX_REFUSALS, "a flood is not said in one go"
        if number % 30 == 0:
            assert tracker.take_refusals()
    assert len(tracker._said) <= 50 and len(tracker.distrusted) <= 50


def test_peer_is_named_by_its_key_and_not_by_what_it_claims():
    tracker, owner = bare_tracker(epoch=5), owner_of(RSAPrivateKey())
    for peer_id in (b"victim", b"\xff" * 250_000):
        record = {**tracker.local_progress.dict(), "peer_id": peer_id, "epoch": 10**6}
        started = time.process_time()
        tracker._parse_swarm_progress_data({owner: ValueWithExpiration(record, get_dht_time() + 30)})
        assert time.process_time() - started < 0.1
    assert set(tracker.take_refusals()) == {name_of(owner)}


def test_claim_that_nobody_could_prove_is_ignored_for_longer_each_time():
    tracker = bare_tracker()
    for expected in (60, 120, 240):
        assert parse(tracker, forger={"epoch": 77}).epoch == 77
        tracker.distrust_claims_above(1)
        assert tracker.global_epoch <= 1
        assert parse(tracker, forger={"epoch": 77}).epoch == 0
        assert parse(tracker, forger={"epoch": 1}).epoch == 1, "what is possible is believed"
        _, seconds, _ = tracker.distrusted[b"forger"]
        assert seconds == expected
        tracker.distrusted[b"forger"] = time.monotonic() - 1, seconds, 1
        parse(tracker, forger={"epoch": 77})
    (reason,) = tracker.take_refusals().values()
    assert "nobody has a state" in reason


def test_records_of_whoever_is_no_member_are_left_out():
    tracker = bare_tracker(epoch=5, is_member=lambda owner: owner != b"expelled")
    progress = parse(tracker, expelled={"samples_accumulated": 30}, honest={"samples_accumulated": 7})
    assert (progress.samples_accumulated, progress.num_peers) == (7, 2)


@pytest.mark.parametrize(
    ("before", "after", "claimed", "trained", "distrusted_after"),
    [
        (0, 14, 10**6, False, 1),  # the swarm's newest state is of epoch 14
        (14, 14, 17, True, 2),  # there is no state to be had: perhaps the network's fault, so try once more
        (0, 0, 17, False, None),  # a newcomer without a state has nothing better to do than to try again
        (0, 14, 15, False, None),
    ],
)
def test_optimizer_stops_asking_for_a_state_that_nobody_has(
    monkeypatch, before, after, claimed, trained, distrusted_after
):
    calls, pauses, learnt = [], [], []
    monkeypatch.setattr("src.swarm.optimizer.time.sleep", pauses.append)
    optimizer = LeanOptimizer.__new__(LeanOptimizer)
    optimizer._parent_pid, optimizer._downloads, optimizer._failed_downloads = None, [], 0
    optimizer.scheduled_state = None
    optimizer.grad_averager = SimpleNamespace(local_samples_accumulated=0, patience=Patience())
    optimizer.state_averager = SimpleNamespace(local_epoch=before, _update_scheduler=lambda: None, lacks_epochs=False)
    optimizer.tracker = SimpleNamespace(
        global_epoch=claimed,
        has_trained=trained,
        local_progress=SimpleNamespace(epoch=before),
        distrust_claims_above=calls.append,
        is_apart=False,
        learn_epoch=learnt.append,
    )
    monkeypatch.setattr(
        hivemind.Optimizer,
        "load_state_from_peers",
        lambda self: setattr(self.state_averager, "local_epoch", after),
    )
    for attempt in range(1, 5):
        optimizer.load_state_from_peers()
        assert bool(calls) == (distrusted_after is not None and attempt >= distrusted_after), attempt
        if calls:
            assert calls == [after + 1]
            break
    assert learnt == [after] * (after > before)
    # each attempt in vain that is not the last is followed by a pause, longer from one to the next
    in_vain = 0 if after > before else attempt - bool(calls)
    assert len(pauses) == in_vain and pauses == sorted(pauses) and all(0 < pause <= 2 for pause in pauses)


def honest_metrics(epoch: int, num: int = 2) -> dict[bytes, TrainerMetrics]:
    return {b"honest%d" % n: TrainerMetrics(epoch=epoch, samples=10, mini_steps=1) for n in range(num)}


def test_forged_metrics_do_not_hide_those_of_others():
    monitor = MetricsMonitor()
    for epoch in (1, 2, 3):
        summary = monitor.summarise({**honest_metrics(epoch), b"forger": TrainerMetrics(epoch=10**6)})
        assert summary is not None and (summary.epoch, summary.samples) == (epoch, 20)
    assert MetricsMonitor().summarise({b"a": TrainerMetrics(epoch=700)}).epoch == 700, "one alone may be quick"


def test_monitor_is_not_led_on_by_a_stranger_who_is_always_a_little_ahead():
    monitor = MetricsMonitor()
    for epoch in range(1, 40):
        forged = TrainerMetrics(epoch=max(monitor.last_epoch, epoch) + 15, samples=1)
        summary = monitor.summarise({**honest_metrics(epoch), b"stranger": forged})
        assert summary is not None and (summary.epoch, summary.samples) == (epoch, 20)


def test_monitor_that_most_keys_have_misled_finds_back_and_is_not_misled_if_it_knows_better():
    forged = {b"stranger%d" % n: TrainerMetrics(epoch=900, samples=1) for n in range(3)}
    monitor = MetricsMonitor()
    for epoch in range(1, 10):
        assert monitor.summarise({**honest_metrics(epoch), **forged}, at_most=epoch + 40).epoch == epoch
    for epoch in range(10, 15):
        monitor.summarise({**honest_metrics(epoch), **forged})
    assert monitor.last_epoch == 900
    summaries = [monitor.summarise(honest_metrics(epoch)) for epoch in range(15, 25)]
    assert [summary and summary.epoch for summary in summaries[2:]] == list(range(17, 25))


@pytest.mark.swarm
@pytest.mark.timeout(120)
def test_forged_records_do_not_disturb_two_peers_of_a_running_swarm():
    """Over a real DHT: two peers count samples and epochs while a stranger claims the impossible under its own key."""
    nodes, trackers = [], []
    try:
        for _ in range(3):
            nodes.append(start_node("run", *(node for node, _ in nodes)))
        options = {"min_refresh_period": 0.1, "default_refresh_period": 0.2, "max_refresh_period": 0.3, "start": True}
        for node, identity in nodes[:2]:
            private_key = identity.private_key
            trackers.append(BoundedProgressTracker(node, "run", TARGET, private_key=private_key, **options))
        stranger, identity = nodes[2]
        owner = RSASignatureValidator(identity.private_key).local_public_key

        def forge(**changes):
            record = LocalTrainingProgress(
                peer_id=nodes[0][0].peer_id.to_bytes(), epoch=0, samples_accumulated=0, samples_per_second=1.0,
                time=get_dht_time(), client_mode=False,
            )  # fmt: skip
            stranger.store(
                "run_progress",
                subkey=owner,
                value={**record.dict(), **changes},
                expiration_time=get_dht_time() + 60,
            )

        def count(epoch: int, samples: int):
            for tracker in trackers:
                tracker.report_local_progress(epoch, samples)
            wait(lambda t: t.global_progress.samples_accumulated == 2 * samples and t.global_epoch == epoch)

        def wait(condition, seconds: float = 20.0):
            give_up_at = time.monotonic() + seconds
            while not all(condition(tracker) for tracker in trackers):
                assert time.monotonic() < give_up_at, [tracker.global_progress for tracker in trackers]
                time.sleep(0.05)

        def next_epoch():
            time.sleep(1.0)
            for tracker in trackers:
                with tracker.pause_updates():
                    tracker.update_epoch(tracker.local_progress.epoch + 1)

        count(0, 100)
        next_epoch()
        count(1, 100)
        forge(epoch=10**6)
        refused = [{}, {}]
        wait(lambda t: refused[trackers.index(t)].update(t.take_refusals()) or refused[trackers.index(t)])
        count(1, 200)
        forge(epoch=1, samples_accumulated=10**12, samples_per_second=1e9)
        time.sleep(1.0)
        count(1, 300)
        assert not any(tracker.ready_to_update_epoch for tracker in trackers)
        assert all(set(peers) == {stranger.peer_id.to_base58()} for peers in refused), refused
        next_epoch()
        count(2, 100)
    finally:
        for tracker in trackers:
            tracker.shutdown(2.0)
        for node, _ in reversed(nodes):
            node.shutdown()


def test_epoch_of_a_swarm_of_clients_is_that_of_its_clients():
    """A helper keeps their state; without one, a client that is behind would ask in vain, and then believe nobody."""
    tracker = bare_tracker(epoch=5, client_mode=True)
    tracker.epoch_since -= 1000.0
    assert parse(tracker, client={"epoch": 9}).epoch == 9
    assert parse(tracker, client={"epoch": 9}, other={"client_mode": False}).epoch == 6


@pytest.mark.swarm
def test_client_that_is_the_first_to_end_an_epoch_ends_it_for_the_others():
    tracker = bare_tracker(epoch=5)
    assert parse(tracker, client={"client_mode": True, "samples_accumulated": 30}).samples_accumulated == 30
    assert parse(tracker, client={"client_mode": True, "epoch": 6}).epoch == 6
    tracker.epoch_since -= 1000.0
    assert parse(tracker, client={"client_mode": True, "epoch": 9}).epoch == 6, "nobody could hand over that state"
    assert parse(tracker, client={"client_mode": True, "epoch": 9}, other={"epoch": 8}).epoch == 9
