"""For whom a round is worth to wait, how long, and how often."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.optim.progress_tracker import LocalTrainingProgress
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer, ValueWithExpiration, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from src.access.ownership import peer_id_of
from src.swarm.matchmaking import Attendance, LeanMatchmaking, Surroundings, epoch_of, is_trainer, read_progress

EPOCH = 7


def gathered(epoch: object, mode: AveragingMode = AveragingMode.NODE) -> bytes:
    return MSGPackSerializer.dumps([None, mode.value, MSGPackSerializer.dumps(epoch)])


def progress(peer: bytes, *, epoch: int = EPOCH, samples: int = 4) -> LocalTrainingProgress:
    return LocalTrainingProgress(
        peer_id=peer, epoch=epoch, samples_accumulated=samples, samples_per_second=1.0, time=0.0, client_mode=False
    )


def leader(*, mode: AveragingMode = AveragingMode.NODE, parameters: bool = False) -> tuple[LeanMatchmaking, object]:
    """A search without network or event loop, begun just now, and its step."""
    matchmaking = LeanMatchmaking.__new__(LeanMatchmaking)
    matchmaking.peer_id, matchmaking.client_mode, matchmaking.current_leader = PeerID(b"leader"), False, None
    matchmaking.attendance, matchmaking.averages_parameters = Attendance(), parameters
    matchmaking.min_matchmaking_time, matchmaking.request_timeout = 60.0, 3.0
    matchmaking.current_followers, matchmaking.may_linger = {}, lambda: False
    matchmaking._start_search()
    matchmaking._found_for = None
    epoch = None if mode == AveragingMode.AUX else EPOCH
    return matchmaking, SimpleNamespace(data_for_gather=gathered(epoch, mode))


def let_ask(matchmaking, *peers: bytes, epoch: object = EPOCH, mode: AveragingMode = AveragingMode.NODE) -> None:
    for peer in peers:
        matchmaking.current_followers[PeerID(peer)] = SimpleNamespace(gather=gathered(epoch, mode))


def see(matchmaking, *records: LocalTrainingProgress, looking: tuple[bytes, ...] = ()) -> None:
    matchmaking._now = Surroundings({record.peer_id: record for record in records}, set(looking))
    matchmaking._first = matchmaking._first or matchmaking._now


def test_round_begins_as_soon_as_all_trainers_with_samples_have_asked():
    matchmaking, step = leader()
    see(
        matchmaking, progress(b"one"), progress(b"two"), progress(b"new", samples=0), progress(b"late", epoch=EPOCH - 1)
    )
    assert not matchmaking._may_begin(step)
    let_ask(matchmaking, b"one")
    assert not matchmaking._may_begin(step) and matchmaking.awaited(step) == {b"two"}
    let_ask(matchmaking, b"two")
    assert matchmaking._may_begin(step)


def test_leader_lets_no_trainer_of_another_swarm_in(monkeypatch):
    monkeypatch.setattr(Matchmaking, "_check_reasons_to_reject", lambda self, request, context: None)

    def lets_in(matchmaking, epoch) -> bool:
        context = SimpleNamespace(remote_id=PeerID(b"%r" % epoch))
        is_in = matchmaking._check_reasons_to_reject(SimpleNamespace(gather=gathered(epoch)), context) is None
        assert matchmaking.attendance.is_awaited(context.remote_id.to_bytes()) == is_in
        return is_in

    matchmaking, step = leader()
    matchmaking.step_control = step
    assert [epoch for epoch in (None, 0, EPOCH - 2, EPOCH - 1, EPOCH, EPOCH + 1, EPOCH + 2, "x")
            if lets_in(matchmaking, epoch)] == [None, EPOCH - 1, EPOCH, EPOCH + 1, "x"]  # fmt: skip
    assistant, step = leader(mode=AveragingMode.AUX)
    assistant.step_control = step
    let_ask(assistant, b"whoever came first", epoch=10**6)
    assert lets_in(assistant, EPOCH)


def test_trainer_that_goes_is_not_waited_for_any_more():
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"), progress(b"two"))
    let_ask(matchmaking, b"one")
    assert not matchmaking._may_begin(step)
    see(matchmaking, progress(b"one"))
    matchmaking._began = matchmaking._computing_until = time.monotonic() - 10
    assert matchmaking._may_begin(step)


def test_peers_that_need_no_time_are_waited_for_a_moment_only():
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"), progress(b"ahead", epoch=EPOCH + 1), looking=(b"assistant",))
    assert matchmaking.awaited(step) == {b"one"}
    let_ask(matchmaking, b"one")
    assert not matchmaking._may_begin(step) and matchmaking.awaited(step) == {b"ahead", b"assistant"}
    matchmaking._began = time.monotonic() - 3.1
    assert not matchmaking._may_begin(step), "the moment begins when the last trainer has come"
    matchmaking._computing_until = time.monotonic() - 3.1
    assert matchmaking._may_begin(step)


def test_nobody_waits_longer_than_the_time_of_a_search():
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"), progress(b"silent"))
    let_ask(matchmaking, b"one")
    assert not matchmaking._may_begin(step)
    matchmaking._asked_at[PeerID(b"one")] -= 60.1
    assert matchmaking._may_begin(step)


def test_leader_whose_patience_is_used_up_begins_with_those_who_are_there():
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"), progress(b"two"))
    let_ask(matchmaking, b"one")
    assert not matchmaking._may_begin(step)
    matchmaking.time_is_up = True
    assert matchmaking._may_begin(step)


def test_assistant_leads_when_two_trainers_of_one_epoch_have_asked():
    matchmaking, step = leader(mode=AveragingMode.AUX)
    see(matchmaking, progress(b"one"), progress(b"two"))
    let_ask(matchmaking, b"another assistant", epoch=None, mode=AveragingMode.AUX)
    let_ask(matchmaking, b"one", mode=AveragingMode.CLIENT)
    assert not matchmaking._may_begin(step), "one trainer has nobody to average with"
    let_ask(matchmaking, b"two", mode=AveragingMode.CLIENT)
    assert matchmaking._may_begin(step)


def test_client_never_leads():
    matchmaking, step = leader(mode=AveragingMode.CLIENT)
    matchmaking.client_mode = True
    see(matchmaking, progress(b"one"))
    let_ask(matchmaking, b"one")
    assert not matchmaking._may_begin(step)


def test_parameters_wait_for_trainers_of_the_new_epoch_and_those_that_still_end_the_old_one():
    matchmaking, step = leader(parameters=True)
    see(matchmaking, progress(b"same", samples=0), progress(b"before", epoch=EPOCH - 1),
        progress(b"new", epoch=EPOCH - 1, samples=0))  # fmt: skip
    assert matchmaking.awaited(step) == {b"same", b"before"}


def test_search_is_in_vain_when_nobody_was_to_be_expected_for_a_while():
    matchmaking, step = leader()
    assert not matchmaking.is_in_vain(step), "nothing is known yet"
    see(matchmaking, progress(b"new", samples=0))
    assert not matchmaking.is_in_vain(step)
    matchmaking._somebody_awaited_at = matchmaking._began = time.monotonic() - 3.1
    assert matchmaking.is_in_vain(step)
    see(matchmaking, progress(b"computing"))
    assert not matchmaking.is_in_vain(step)
    see(matchmaking)
    matchmaking._somebody_awaited_at = matchmaking._computing_until = time.monotonic() - 3.1
    let_ask(matchmaking, b"one")
    assert not matchmaking.is_in_vain(step)


def test_trainer_that_would_be_alone_waits_for_those_that_have_just_begun_if_it_loses_nothing():
    matchmaking, step = leader()
    see(matchmaking, progress(b"new", samples=0))
    assert matchmaking.awaited(step) == set(), "it would stand still meanwhile"
    matchmaking.may_linger = lambda: True
    assert matchmaking.awaited(step) == {b"new"}
    let_ask(matchmaking, b"assistant", epoch=None, mode=AveragingMode.AUX)
    assert matchmaking.awaited(step) == {b"new"} and not matchmaking._may_begin(step)
    see(matchmaking, progress(b"new", samples=0), progress(b"one"))
    let_ask(matchmaking, b"one")
    assert matchmaking.awaited(step) == set() and matchmaking._may_begin(step)


def test_search_is_over_as_soon_as_the_group_is_there():
    async def scenario():
        matchmaking, step = leader()
        matchmaking.step_control, matchmaking.assembled_group = step, asyncio.Future()
        assert matchmaking.is_searching(step)
        matchmaking.assembled_group.set_result("group")
        assert not matchmaking.is_searching(step), "who gave up now would leave the others waiting for its part"
        matchmaking.step_control, matchmaking.assembled_group = None, asyncio.Future()
        matchmaking._found_for = step
        assert not matchmaking.is_searching(step)
        assert matchmaking.is_searching(SimpleNamespace()), "the next one"

    asyncio.run(scenario())


def test_search_with_assistants_alone_is_in_vain_like_any_other():
    matchmaking, step = leader()
    see(matchmaking)
    let_ask(matchmaking, b"assistant", epoch=None, mode=AveragingMode.AUX)
    matchmaking._somebody_awaited_at = matchmaking._began = time.monotonic() - 3.1
    assert matchmaking.is_in_vain(step)


def test_search_that_found_nobody_is_held_against_those_who_could_have_come(monkeypatch):
    matchmaking, step = leader()

    async def search_in_vain(self, step):
        see(self, progress(b"phantom"), progress(b"behind", epoch=EPOCH - 1))
        self._began = time.monotonic() - 61.0

    monkeypatch.setattr(Matchmaking, "look_for_group", search_in_vain)
    matchmaking.step_control = None
    assert asyncio.run(matchmaking.look_for_group(step)) is None
    assert not matchmaking.attendance.is_awaited(b"phantom") and matchmaking.attendance.is_awaited(b"behind")


def note(matchmaking, step, *, waited: float, members: set[bytes], last: Surroundings) -> None:
    matchmaking._began = time.monotonic() - waited

    async def surroundings():
        return last

    matchmaking._surroundings = surroundings
    asyncio.run(matchmaking._note_attendance(step, members, matchmaking._began, matchmaking._first))


@pytest.mark.parametrize(("waited", "expected"), [(59.0, False), (20.0, True)])
def test_who_did_not_come_in_a_whole_search_is_not_waited_for_again(waited, expected):
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"), progress(b"phantom"), looking=())
    note(matchmaking, step, waited=waited, members={b"leader", b"one"}, last=matchmaking._now)
    matchmaking._start_search()
    see(matchmaking, progress(b"one"), progress(b"phantom"))
    let_ask(matchmaking, b"one")
    assert (b"phantom" in matchmaking.awaited(step)) is expected
    matchmaking.attendance.came(b"phantom")
    assert matchmaking.awaited(step) == {b"phantom"}


def test_who_turned_up_during_the_search_is_not_held_to_have_missed_it():
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"))
    last = Surroundings({peer: progress(peer) for peer in (b"one", b"new")}, set())
    note(matchmaking, step, waited=59.0, members={b"leader", b"one"}, last=last)
    assert matchmaking.attendance.is_awaited(b"new")


def test_dead_assistant_costs_one_short_wait():
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"), looking=(b"dead",))
    note(matchmaking, step, waited=3.2, members={b"leader", b"one"}, last=matchmaking._now)
    assert not matchmaking.attendance.is_awaited(b"dead") and matchmaking.attendance.is_awaited(b"one")


@pytest.mark.parametrize("members", [{b"leader", b"one"}, set()], ids=["a group", "no group"])
def test_phantom_that_follows_the_epochs_costs_one_short_wait(members):
    matchmaking, step = leader()
    see(matchmaking, progress(b"one"), progress(b"phantom"))
    last = Surroundings({b"one": progress(b"one"), b"phantom": progress(b"phantom", epoch=EPOCH + 1)}, set())
    if members:
        note(matchmaking, step, waited=5.0, members=members, last=last)
    else:  # then this peer may have come when the others were gone
        matchmaking._began -= 5.0
        matchmaking._note_missing(step, set(), matchmaking._began, matchmaking._first, last)
    assert matchmaking.attendance.is_awaited(b"phantom") is not bool(members)


def test_attendance_gives_those_who_have_come_before_another_chance_ever_later():
    attendance = Attendance()
    attendance.came(b"partner")
    for skipped in (1, 3, 7):
        assert attendance.is_awaited(b"partner")
        attendance.missed(b"partner")
        for _ in range(skipped):
            assert not attendance.is_awaited(b"partner")
            attendance.missed(b"partner")
    attendance.came(b"partner")
    assert attendance.is_awaited(b"partner")
    attendance.missed(b"stranger")
    for _ in range(100):
        attendance.missed(b"stranger")
        assert not attendance.is_awaited(b"stranger")


def test_leader_that_did_not_let_this_peer_in_is_asked_again_ever_later(monkeypatch):
    async def refuse(self, leader):
        self.potential_leaders.past_attempts.add((leader, 60.0))

    monkeypatch.setattr(Matchmaking, "_request_join_group", refuse)
    monkeypatch.setattr("src.swarm.matchmaking.FIRST_RETRY_SECONDS", 0.1)

    async def scenario():
        matchmaking, _ = leader()
        matchmaking.potential_leaders = SimpleNamespace(past_attempts=set())
        attempts = matchmaking.potential_leaders.past_attempts
        for seconds in (0.1, 0.2):
            await matchmaking._request_join_group(PeerID(b"busy"))
            attempts.add((PeerID(b"other"), 60.0))
            await asyncio.sleep(0.6 * seconds)
            assert len(attempts) == 2
            await asyncio.sleep(0.6 * seconds)
            assert attempts == {(PeerID(b"other"), 60.0)}

    asyncio.run(scenario())


def test_client_follows_also_a_leader_whose_own_time_is_later():
    matchmaking, _ = leader()
    matchmaking.client_mode = True
    matchmaking.potential_leaders = SimpleNamespace(search_end_time=float("inf"), declared_expiration_time=float("inf"))
    assert matchmaking.get_request_expiration_time() > get_dht_time() + 10 * matchmaking.min_matchmaking_time


def new_owner() -> tuple[bytes, bytes]:
    """The subkey of a peer's records, and its peer id."""
    key = RSAPrivateKey().get_public_key().to_bytes()
    return b"[owner:" + key + b"]", peer_id_of(key).to_bytes()


@pytest.mark.parametrize(
    "value", ["text", None, {**progress(b"x").dict(), "epoch": -1}, [1, 2]],
    ids=["no record", "goodbye", "impossible", "a list"],
)  # fmt: skip
def test_progress_is_read_from_well_formed_records_only(value):
    (owner, peer), (other, _) = new_owner(), new_owner()
    good = ValueWithExpiration(progress(b"x").dict(), 1.0)
    for found in (None, value, {}, {b"nobody": good}, {other: ValueWithExpiration(value, 1.0)}):
        assert read_progress(found) == {}
    assert set(read_progress({other: ValueWithExpiration(value, 1.0), owner: good})) == {peer}


def test_whose_progress_it_is_follows_from_the_key_that_has_signed_it():
    (owner, peer), (_, victim) = new_owner(), new_owner()
    for claimed in (victim, bytes(250_000)):
        assert set(read_progress({owner: ValueWithExpiration(progress(claimed).dict(), 1.0)})) == {peer}


@pytest.mark.parametrize("data", [b"", b"\xff\xff", MSGPackSerializer.dumps(1), MSGPackSerializer.dumps([1, 2])])
def test_what_members_gather_may_be_anything(data):
    assert epoch_of(data) is None
    assert is_trainer(data) in (True, False)
