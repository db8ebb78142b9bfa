"""hivemind's averagers, made to say how each round went, to take only good states, and not to lose step.

Names of these classes are part of the protocol (they name the remote calls): all peers of a run must use the same ones.
"""

import asyncio
import logging
import math
import multiprocessing
import random
import secrets
from collections import Counter
from statistics import median_low

import torch
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager, dump_optimizer_state
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import DHTExpiration, MPFuture

from src.access.ownership import names_in
from src.process.watchdog import START_SECONDS, watch
from src.swarm.client_state import ClientState
from src.swarm.contributions import Judge
from src.swarm.matchmaking import epoch_of, is_trainer
from src.swarm.rounds import POLL_SECONDS, RoundReporting
from src.swarm.state_check import check_state, far_apart, sample_parameters
from src.swarm.state_download import StateReceiver
from src.swarm.state_transfer import Stage, StateSender, TooSlowError
from src.swarm.wire import check_wire_tensor

logger = logging.getLogger(__name__)

MAX_KEPT_AGE = 30  # epochs by which the state that an auxiliary peer keeps may be behind the swarm
TRAINER, CLIENT, KEEPER = range(3)  # who may send a state; a keeper is an auxiliary peer that has it from a client
MAX_LEAD = 20  # epochs by which a donor may be ahead of where the swarm was last seen
NUM_WITNESSES = 3
AVERAGING_PROCESS = "the process that averages {kind}"


class OwnProcess:
    """Mixin: this peer's watchdog watches an averager's process, which closes its connection to p2pd when it is shut
    down, and so removes its socket."""

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        super().run_in_background(await_ready=False)
        watch(self._what(), self.pid)
        if await_ready:
            self.wait_until_ready(timeout)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        super().wait_until_ready(START_SECONDS if timeout is None else timeout)
        watch(self._what(), self.pid, self._ask)

    def _what(self) -> str:
        return AVERAGING_PROCESS.format(kind=self.round_kind)

    def _ask(self) -> None:
        future = MPFuture()
        self._outer_pipe.send(("_answer", [future], {}))
        future.result()

    async def _answer(self, future: MPFuture) -> None:
        future.set_result(None)

    async def _shutdown(self, timeout: float | None) -> None:
        try:  # `shutdown` kills the process when the whole of ``timeout`` has passed, and its socket would stay
            await super()._shutdown(timeout and timeout / 2)
        finally:
            await self._p2p.shutdown()


def read_introductions(members: dict | None) -> tuple[dict, bool]:
    """({member: its epoch}, whether one of them says that its parameters are apart), of the result of a round.

    They are when it has not got all averages of an earlier round; else those of all members are equal.
    """
    epochs, is_one_apart = dict(members or {}), False
    for member, said in epochs.items():
        if isinstance(said, (list, tuple)) and len(said) == 2 and type(said[1]) is bool:
            epochs[member], is_one_apart = said[0], is_one_apart or said[1]
    return epochs, is_one_apart


class LeanGradientAverager(OwnProcess, RoundReporting, GradientAverager):
    """Averages gradients once an epoch; nobody can have computed more than ``target_batch_size`` samples of them.

    Members of a group tell each other their ``local_epoch()`` and whether they are ``is_apart()``: the result of a step
    holds it by peer.
    """

    round_kind = "gradients"

    def __init__(self, *args, target_batch_size: int = 2**20, robust_averaging: str | None = None, **kwargs):
        self.judge = Judge(max_weight=target_batch_size, robust_averaging=robust_averaging)
        super().__init__(*args, **{"allow_state_sharing": False, **kwargs})

    @staticmethod
    def local_epoch() -> int:
        return 0

    @staticmethod
    def is_apart() -> bool:
        return False

    def introduction(self) -> int | list:
        """What this peer tells the others of a group, see `read_introductions`."""
        return [self.local_epoch(), True] if self.is_apart() else self.local_epoch()

    def accumulate_grads_(self, batch_size: int) -> None:
        """As hivemind's, which divides by the number of local steps, as if all had as many samples as the first."""
        super().accumulate_grads_(batch_size)
        if not self.reuse_grad_buffers:
            self.local_times_accumulated += batch_size / self._anchor_batch_size - 1

    def schedule_step(self, scheduled_time: DHTExpiration | None = None, **kwargs) -> StepControl:
        """As hivemind's, with this peer's epoch for the others of the group."""
        return super().schedule_step(scheduled_time, gather=self.introduction(), **kwargs)

    def load_state_from_peers(self, **kwargs) -> None:
        """Nothing: gradients are no state. hivemind would download them from a peer and throw them away."""


class LeanStateAverager(OwnProcess, RoundReporting, StateSender, StateReceiver, ClientState, TrainingStateAverager):
    """Averages parameters now and then, and hands the state to peers that join.

    A state is taken from another peer only if it fits, is finite and near to what a second donor has, if there is one;
    else the next donor is asked. ``swarm_epoch()`` is where the swarm is believed to be.
    """

    round_kind = "parameters"
    has_taken_state, state_epoch = False, 0  # by the last `load_state_from_peers`, and of which epoch it was
    lacks_epochs = False  # that state: parameters of others are newer
    _search: asyncio.Task | None = None  # for a good state, in the averager's process
    averages_parameters = True

    def __init__(self, *args, robust_averaging: str | None = None, **kwargs):
        self.judge = Judge(max_weight=1.0, harmless_rms=0.05, max_distance=0.2, robust_averaging=robust_averaging)
        self._expected_epoch = multiprocessing.Value("d", 0.0)
        self._source = multiprocessing.Value("i", TRAINER)  # who has sent the last state that was taken
        super().__init__(*args, **kwargs)

    @staticmethod
    def swarm_epoch() -> int:
        return 0

    final_epoch = math.inf  # of the run

    def _do(self, wait_for_trigger, optimizer_step: bool, *args, **kwargs):
        """As hivemind's, but what an optimizer can compute before it changes anything is done before it has the locks:
        meanwhile others can have this peer's state, and a backup can be written."""
        prepare = getattr(self.optimizer, "prepare", None)
        if prepare is None or not optimizer_step:
            return super()._do(wait_for_trigger, optimizer_step, *args, **kwargs)

        def wait_and_prepare() -> None:
            if wait_for_trigger is not None:
                wait_for_trigger()
            prepare()

        return super()._do(wait_and_prepare, optimizer_step, *args, **kwargs)

    def get_current_state(self):
        """As hivemind's, but the last epoch is named only when its step is done: that state is kept as the result."""
        updates = tuple(self.pending_updates)
        metadata, tensors, infos = super().get_current_state()
        is_under_way = not all(update.done() for update in (*updates, *self.pending_updates))
        if is_under_way and metadata["epoch"] >= self.final_epoch:
            metadata["epoch"] -= 1
        if self.mode is AveragingMode.AUX:  # while it takes the next state, it has no epoch of its own
            metadata.update(kept=True, epoch=int(self.state_sharing_priority))
        return metadata, tensors, infos

    def load_state_from_peers(self, **kwargs):
        """As hivemind's, but the options of the optimizer stay this peer's own, and the schedule sets the rate."""
        self._expected_epoch.value, self.has_taken_state = self.swarm_epoch(), False
        groups = self.optimizer.param_groups
        some_parameter = groups[0]["params"][0]
        version = some_parameter._version  # hivemind does not say whether it has loaded anything
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        try:
            super().load_state_from_peers(**kwargs)
            self.has_taken_state = some_parameter._version != version
            self.state_epoch = self.local_epoch
            self._go_on_from_kept_state()
        except TimeoutError:  # hivemind's optimizer would begin anew, for ever
            self._report_refusal("?", "no state came in the time that one takes at the slowest rate")
        except ValueError as error:  # not reached as long as the check of the averager's process is as strict
            self._report_refusal("?", f"its state does not fit: {error}")
        finally:
            for group, options in zip(groups, own, strict=True):
                group.update(options)
            if self.scheduler is not None:
                rates = zip(groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
                for group, base, factor in rates:
                    group["lr"] = base * factor(self.scheduler.last_epoch)

    @property
    def took_state_of_client(self) -> bool:
        return self.has_taken_state and self._source.value == CLIENT

    def _go_on_from_kept_state(self) -> None:
        """An auxiliary peer has no newer state to give than it has taken: who joins counts it as the swarm's.

        The next averaging of parameters brings what is missing. The last epoch must be trained by oneself: its state
        is the run's result.
        """
        behind = self.swarm_epoch() - self.local_epoch
        is_kept = self.has_taken_state and self._source.value == KEEPER and self.mode is not AveragingMode.AUX
        self.lacks_epochs = is_kept and 0 < behind <= MAX_KEPT_AGE
        if self.lacks_epochs:
            self.local_epoch = min(self.swarm_epoch(), max(self.local_epoch, self.final_epoch - 1))
            self._update_scheduler()

    # -- in the averager's process

    async def _aggregate_with_group(self, group_info: GroupInfo, **kwargs) -> dict:
        # Nor may an epoch that somebody claims become this peer's own: hivemind takes the highest in the result.
        group_info = self._of_one_epoch(self._usable_members(group_info))
        _, _, own = self.serializer.loads(group_info.gathered[group_info.peer_ids.index(self.peer_id)])
        result = await super()._aggregate_with_group(group_info, **kwargs)
        result.update(dict.fromkeys(result, self.serializer.loads(own)))
        return result

    def _of_one_epoch(self, group_info: GroupInfo) -> GroupInfo:
        """The trainers of a group that are in this peer's epoch, and their assistants.

        Peers of different epochs would wait for each other, one here, the other in a round of gradients; and whoever
        claims another one must not keep the rest from their round. All of such a part see it alike, and call nobody
        else. The assistants help the largest part, of equal ones that which is furthest back.
        """
        members = dict(zip(group_info.peer_ids, group_info.gathered, strict=True))
        epochs = {peer: epoch_of(gathered) for peer, gathered in members.items() if is_trainer(gathered)}
        counts = Counter(epoch for epoch in epochs.values() if epoch is not None)
        helped = max(counts, key=lambda epoch: (counts[epoch], -epoch), default=None)
        own = epochs.get(self.peer_id, helped)
        if own is not None and counts[own] < 2 and len(epochs) > 1:
            raise MatchmakingException("the group's trainers are in different epochs")
        kept = {
            peer: gathered
            for peer, gathered in members.items()
            if peer == self.peer_id or (epochs[peer] == own if peer in epochs else own == helped)
        }
        if len(kept) == len(members):
            return group_info
        for peer in epochs.keys() - kept.keys():
            self._remark(f"averages parameters without {peer}, which is in epoch {epochs[peer]}, not {own}")
        return GroupInfo(group_info.group_id, tuple(kept), tuple(kept.values()))

    async def rpc_sample_state(
        self, request: averaging_pb2.AveragingData, context: P2PContext
    ) -> averaging_pb2.AveragingData:
        """A few parameters, by which a joining peer compares donors; ``weight`` is this peer's epoch."""
        if not self.allow_state_sharing or not await self._admits(context.remote_id):
            return averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
        self.attendance.came(context.remote_id.to_bytes())
        tensors = self._averaged_tensors
        if not self.reuse_tensors:  # then those of the averager are as old as the last round
            _, tensors, _ = await self._get_current_state_from_host_process()
            tensors = tensors[: len(self._averaged_tensors)]
        samples = sample_parameters(tensors, request.group_id[:64])
        return averaging_pb2.AveragingData(
            code=averaging_pb2.AVERAGED_PART,
            tensor_part=serialize_torch_tensor(samples),
            weight=self.state_sharing_priority,
        )

    async def _load_state_from_peers(self, future: MPFuture, timeout: float | None = None) -> None:
        """Hand over a good state, or ``None`` if no donor has one or this peer is about to leave."""
        if self._search is not None:
            self._search.cancel()  # whoever asked for it has given up
        self._search = search = asyncio.create_task(self._find_good_state())
        try:
            while not search.done() and not self.patience.is_over:
                await asyncio.wait([search], timeout=POLL_SECONDS)
            future.set_result(search.result() if search.done() else None)
            future._result = None  # hivemind keeps the future until the next call, and the state is the owner's now
        finally:
            search.cancel()
            self._search = None if self._search is search else self._search
            if not future.done():
                future.set_result(None)

    async def _find_good_state(self) -> tuple[dict, list[torch.Tensor]] | None:
        """Download from donors until one's state is good."""
        try:
            donors, clients = await self._find_donors()
        except TimeoutError as error:
            self._report_refusal("?", f"no state was asked for: {error}")
            return None
        to_ask, slow = list(donors), set()
        own = [*self._averaged_tensors, *dump_optimizer_state(self.optimizer)[1]]
        # An auxiliary peer trains nothing: until it has taken a whole good state, nobody reads these tensors, unless it
        # hands on the last one.
        stage = Stage(own, in_place=self.mode is AveragingMode.AUX and not self.allow_state_sharing)
        while to_ask:
            donor = to_ask.pop(0)
            try:
                # who stands still or trickles must not keep this peer from asking the next one
                metadata, tensors = await self._download(donor, stage, is_only_one=not to_ask)
                check_state(metadata, tensors, parameters=self._averaged_tensors, optimizer=self.optimizer)
                await self._compare_donors(donor, metadata["epoch"], tensors, donors)
                self._source.value = CLIENT if donor in clients else KEEPER if metadata.get("kept") else TRAINER
                return metadata, tensors
            except Exception as error:
                rest = "asking the next donor" if to_ask else "there is no other donor"
                reason = str(error) or type(error).__name__
                if isinstance(error, TooSlowError) and to_ask and donor not in slow:
                    slow.add(donor)
                    to_ask.append(donor)  # a slow state is better than none
                self._report_refusal(str(donor), f"its state was not taken: {reason}; {rest}")
        return None

    async def _find_donors(self) -> tuple[list[PeerID], set[PeerID]]:
        """Those who offer their state, the newest first, and which of them are clients; nobody gets ahead of the others
        by an absurd claim. A client is asked only by whom it is connected with, and where others are further back."""
        prefix = self._matchmaking.group_key_manager.prefix
        offers = await self._offers(f"{prefix}.all_averagers")
        of_clients = await self._offers(self._clients_key)
        connected = await self._is_connected_with() if of_clients else set()
        clients = (of_clients.keys() & connected) - offers.keys()
        offers.update((peer, of_clients[peer]) for peer in clients)
        if not offers:
            return [], set()
        highest = max(median_low(offers.values()), self._expected_epoch.value) + 1.0
        epochs = {peer: min(epoch, highest) + (peer not in clients) for peer, epoch in offers.items()}
        return sorted(offers, key=lambda peer: (epochs[peer], random.random()), reverse=True), clients

    async def _offers(self, key: str) -> dict[PeerID, float]:
        """Others who offer their state under a key of the DHT, and the epochs that they claim."""
        found = await self._in_time(self.dht.get(key, latest=True, return_future=True), "the swarm's records")
        offers = found.value.items() if found is not None and isinstance(found.value, dict) else ()
        epochs = {
            PeerID(peer): float(entry.value)
            for peer, entry in offers
            if isinstance(peer, bytes) and type(entry.value) in (int, float) and 0 <= entry.value < math.inf
        }
        epochs.pop(self.peer_id, None)
        return epochs

    async def _compare_donors(self, donor: PeerID, epoch: int, tensors, donors: list[PeerID]) -> None:
        """Raises ValueError if more of the other donors contradict a state than confirm it.

        Of this peer's initial peers, as donors and as others, the word counts alone: nobody else can have their ids,
        while anybody can have many.
        """
        expected, seed = self._expected_epoch.value, secrets.token_bytes(16)
        if epoch > expected + MAX_LEAD:
            raise ValueError(f"it claims epoch {epoch}, the swarm is at {expected:.0f}")
        samples = sample_parameters(tensors[: len(self._averaged_tensors)], seed)
        trusted = set(names_in(self.dht.initial_peers or ()))
        others = [peer for peer in donors if peer != donor]
        witnesses = sorted(others, key=lambda peer: str(peer) not in trusted)[:NUM_WITNESSES]
        found = await asyncio.gather(*(self._samples_of(peer, seed) for peer in witnesses))
        # who is silent, or has just joined and has no state of its own yet, says nothing
        answers = {
            peer: answer
            for peer, answer in zip(witnesses, found, strict=True)
            if answer is not None and expected - 3 <= answer[0] < math.inf
        }
        of_trusted = {peer: answer for peer, answer in answers.items() if str(peer) in trusted}
        if of_trusted or str(donor) in trusted:
            answers = of_trusted
        confirmed, contradictions = 0, []
        for witness, answer in answers.items():
            difference = far_apart(samples, answer[1])
            if difference:
                contradictions.append(f"{witness} has another one, {difference}")
            else:
                confirmed += 1
        if len(contradictions) > confirmed:
            raise ValueError("; ".join(contradictions))

    async def _samples_of(self, witness: PeerID, seed: bytes) -> tuple[float, torch.Tensor] | None:
        """Another donor's epoch and samples of its parameters, if it sends them in time."""
        try:
            stub = self.get_stub(self._p2p, witness, namespace=self.prefix)
            request = stub.rpc_sample_state(averaging_pb2.AveragingData(group_id=seed))
            answer = await self._in_time(request, "it", at_most=self._answer_seconds())
            check_wire_tensor(answer.tensor_part)
            return answer.weight, deserialize_torch_tensor(answer.tensor_part)
        except Exception as error:
            logger.debug("no samples from %s: %r", witness, error)
            return None


__all__ = [
    "LeanGradientAverager",
    "LeanStateAverager",
    "OwnProcess",
]
