"""Every change to hivemind's own behaviour, in one place: what is wrong there, what is done, which test shows it.

`apply` makes the patches, once in a process and before hivemind forks its own, and refuses another version than the one
they were written for. What our classes override although hivemind's names say that it may go in any release is listed
below; `tests/swarm/test_hivemind_fixes.py` fails when a release renames or rewrites any of it.
"""

import asyncio
import contextlib
import hashlib
import inspect
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from dataclasses import dataclass

import hivemind
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.averager import DecentralizedAverager
from hivemind.averaging.control import StepControl
from hivemind.averaging.key_manager import GroupKeyManager
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.averaging.partition import TensorPartContainer
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.progress_tracker import ProgressTracker
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.utils import MPFuture
from hivemind.utils.auth import AuthRPCWrapper

from src.access.gate import bind_requests_to_callers
from src.access.ownership import sift_dictionaries
from src.access.record_limits import limit_records

VERSION = "1.1.12"


@dataclass(frozen=True)
class Fix:
    """A patch: ``fault`` of hivemind in ``where``, the ``remedy``, and the ``test`` that fails without it.

    ``changes``: {what is replaced: the beginning of the SHA-256 of its source}. ``make`` replaces it.
    """

    fault: str
    where: str
    remedy: str
    test: str
    changes: dict[Callable, str]
    make: Callable[[], None]


def correct_step_cancellation() -> None:
    """Let `StepControl.cancel` mark a step as cancelled before it wakes the averager.

    hivemind 1.1.12 wakes the averager's process first. If that looks at the step before it is marked, the round runs
    although its owner no longer takes part, and that peer stays one averaging round off its partners.
    """

    def cancel(self: StepControl) -> bool:
        was_cancelled = MPFuture.cancel(self)
        if self._trigger is not None:
            self._trigger.cancel()
        if self._cancel is not None and not self._cancel.done():
            with contextlib.suppress(InvalidStateError):  # the averager gave up at the same moment
                self._cancel.set_result(None)
        return was_cancelled

    StepControl.cancel = cancel


def end_searches_without_waiting() -> None:
    """Let an averager begin its round at once when it has a group.

    hivemind 1.1.12 first tells the DHT that the search is over and waits for the answers. When a node has died lately
    that takes seconds, in which the other members of the group wait, and give up.
    """
    declare, in_the_background = GroupKeyManager.declare_averager, set()

    async def declare_averager(
        self: GroupKeyManager, group_key, peer_id, expiration_time, looking_for_group: bool = True
    ) -> bool:
        task = asyncio.ensure_future(declare(self, group_key, peer_id, expiration_time, looking_for_group))
        if looking_for_group:
            return await task
        in_the_background.add(task)  # asyncio itself keeps no reference
        task.add_done_callback(in_the_background.discard)
        return True

    GroupKeyManager.declare_averager = declare_averager


FIXES = (
    Fix(
        fault="a step that is cancelled wakes its averager before it is marked, so the round may run without its owner",
        where="averaging/control.py, StepControl.cancel",
        remedy="mark first",
        test="tests/swarm/test_averagers.py::test_step_cancellation_marks_the_step_before_it_wakes_the_averager",
        changes={StepControl.cancel: "1abd18ff01412737"},
        make=correct_step_cancellation,
    ),
    Fix(
        fault="a group that is complete waits until the DHT knows that the search is over: seconds, if a node has died",
        where="averaging/key_manager.py, GroupKeyManager.declare_averager",
        remedy="tell it in the background",
        test="tests/swarm/test_averagers.py::test_end_of_a_search_is_told_in_the_background_and_its_beginning_is_not",
        changes={GroupKeyManager.declare_averager: "3df3ecf507a8088b"},
        make=end_searches_without_waiting,
    ),
    Fix(
        fault="one bad entry hides all others of a list, and the expiration that a list claims is believed",
        where="dht/protocol.py, DHTProtocol._validate_dictionary and call_find",
        remedy="keep the good entries, and count their own expirations only",
        test="tests/access/test_ownership.py::test_one_bad_entry_leaves_the_others_of_a_dictionary",
        changes={DHTProtocol._validate_dictionary: "64e1927db3e373fb", DHTProtocol.call_find: "433adef0e520e526"},
        make=sift_dictionaries,
    ),
    Fix(
        fault="lists of records have no bounds: a stranger with thousands of keys makes looks slow, then impossible",
        where="dht/storage.py, DictionaryDHTValue.store and DHTLocalStorage.store",
        remedy="bounds of number and bytes; those whom this peer knows are kept first",
        test="tests/access/test_ownership.py",
        changes={DictionaryDHTValue.store: "ed012b155a0d4bd4", DHTLocalStorage.store: "e2e09fb8bbae76c5"},
        make=limit_records,
    ),
    Fix(
        fault="a signed request names neither side, so whoever has seen one may pass it on as its own",
        where="utils/auth.py, AuthRPCWrapper, as used by dht/protocol.py",
        remedy="a request or an answer counts only from the peer whose token it carries",
        test="tests/access/test_private_runs.py",
        changes={AuthRPCWrapper: "aa460d272db764b9"},
        make=bind_requests_to_callers,
    ),
)

# What is overridden or called by our subclasses: why stands beside each.
OVERRIDES: dict[type, tuple[str, ...]] = {
    hivemind.Optimizer: (
        "_make_state_averager",
        "_maybe_schedule_gradient_averaging",
        "_maybe_schedule_state_averaging",
        "_average_gradients_and_load_into_optimizer",
        "_begin_averaging_gradients",
        "_make_gradient_averager",
        "_should_load_state_from_peers",
        "_update_global_epoch",
        "_load_averaged_gradients_into_optimizer_",
        "_tag_along_with_zero_weight",
        "_load_local_gradients_into_optimizer",
        "_check_and_accumulate_gradients",
    ),
    Matchmaking: ("look_for_group", "leader_assemble_group", "get_request_expiration_time", "_request_join_group"),
    GradientAverager: ("load_accumulators_into_averager_", "reset_accumulated_grads_"),
    DecentralizedAverager: (
        "_step",
        "_aggregate_with_group",
        "_run_allreduce_inplace_",
        "_register_allreduce_group",
        "rpc_aggregate_part",
        "rpc_download_state",
        "_get_current_state_from_host_process",
        "_load_state_from_peers",
        "_trigger_declare_load_state",
        "_collect_rpc_handlers",
        "_get_handle_name",
    ),
    AllReduceRunner: (
        "run",
        "_get_peer_stub",
        "_communicate_with_peer",
        "_accumulate_parts_streaming",
        "_generate_input_for_peer",
        "should_delay_results",
        "rpc_aggregate_part",
        "_ban_sender",
    ),
    TensorPartContainer: ("register_processed_part", "register_failed_reducer", "iterate_output_tensors"),
    TrainingStateAverager: ("_load_local_tensors_into_averager_", "_do", "_apply_optimizer_parameters_"),
    ProgressTracker: ("report_local_progress", "global_epoch"),
    GroupKeyManager: ("get_averagers",),
}

_applied: list[Fix] = []


def apply() -> None:
    """Raises RuntimeError if hivemind is another version, or what is to be patched is not what it was."""
    if _applied:
        return
    if hivemind.__version__ != VERSION:
        raise RuntimeError(
            f"hivemind {hivemind.__version__} is installed, but {VERSION} is needed: see requirements.txt"
        )
    for fix in FIXES:
        for thing, digest in fix.changes.items():
            if source_digest(thing) != digest:
                raise RuntimeError(f"{fix.where} of the installed hivemind is not that of {VERSION}: install it anew")
    for fix in FIXES:
        fix.make()
        _applied.append(fix)


def source_digest(thing: Callable) -> str:
    return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()[:16]
