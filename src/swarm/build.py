"""Put the swarm's optimizer together: LAMB or Muon with its schedule, hivemind around it, and the options of both."""

import logging
import math
import multiprocessing
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import hivemind
import torch
from torch.optim.lr_scheduler import LambdaLR

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments
from src.access.membership import Identity
from src.models.shared_linear import dense_matrices
from src.optim.lamb import CPULAMB8Bit
from src.optim.local_steps import AnchoredLAMB
from src.optim.muon import CPUMuon8Bit
from src.optim.parameter_groups import parameter_groups
from src.optim.schedules import decay_epochs, learning_rate_factor
from src.swarm import hivemind_fixes
from src.swarm.averagers import LeanGradientAverager
from src.swarm.compression import gradient_compression, parameter_compression
from src.swarm.dht import LEAVE_SECONDS
from src.swarm.local_steps import DifferenceAverager, LocalStepsOptimizer
from src.swarm.matchmaking import Attendance
from src.swarm.optimizer import LeanOptimizer
from src.swarm.patience import Patience
from src.swarm.probe import ask_epoch, reachable, tell_epoch
from src.swarm.rounds import SHORTEST_ROUND

logger = logging.getLogger(__name__)

# At the end of an epoch a trainer waits for its rounds so much longer than --next_chunk_timeout. When that time is used
# up, a second round whose group waits already still gets the shortest time: with 8 s, 12.7 s in all.
PATIENCE_ALLOWANCE = 2.0
SEARCH_ALLOWANCE = 5.0  # a search lasts --matchmaking_time, and so much longer if the network is slow
# Of a request to join a group; it must be shorter than the search, or peers wait for each other.
REQUEST_SECONDS, REQUEST_SHARE = 3.0, 0.8
# hivemind would wait for a silent reducer twice as long as for a silent sender. A reducer answers when it has given up
# the slowest sender, so that it must be waited for a little longer, but not longer than promised.
SENDER_SHARE = 0.75
REFRESH_SHARE, REFRESH_SECONDS = 0.5, (1.0, 10.0)  # of --matchmaking_time, within these: between looks at the progress
FIRST_REFRESH_SECONDS, USUAL_REFRESH_SECONDS = 0.5, 3.0
DEFAULT_LR_FLOOR = 0.02  # of the peak learning rate


def patience_seconds(*, matchmaking_time: float, next_chunk_timeout: float) -> float:
    """How long a trainer waits at the end of an epoch for all its searches and rounds together."""
    return max(
        next_chunk_timeout + PATIENCE_ALLOWANCE,
        matchmaking_time + SEARCH_ALLOWANCE + SHORTEST_ROUND * next_chunk_timeout,
    )


def make_groups(model: torch.nn.Module, args: HFTrainerArguments) -> list[dict]:
    """The model's parameters in the groups of the run's optimizer. Raises ValueError if there is nothing for Muon."""
    matrices = dense_matrices(model) if args.optimizer == "muon" else {}
    if args.optimizer == "muon" and not matrices:
        raise ValueError("--optimizer muon: this model has no dense matrices (block_size); train it with lamb")
    return parameter_groups(model, args.weight_decay, matrices=matrices)


def make_optimizer(
    params,
    args: HFTrainerArguments,
    *,
    device: torch.device | str = "cpu",
    in_background: bool = False,
    outer: dict[str, float] | None = None,
) -> CPULAMB8Bit:
    """The run's --optimizer with its hyperparameters; it may use up the gradients, which nobody reads after the step.

    ``params``: from `make_groups`. ``device``, ``in_background``: see `CPUMuon8Bit`. ``outer``: what `AnchoredLAMB`
    takes, for peers that make local steps.
    """
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "clamp_value": args.clamp_value,
        "min_8bit_size": args.min_8bit_size,
        "max_grad_norm": args.max_grad_norm or None,
        "reuse_grad_buffers": True,
        "kernel": "auto",
    }
    if outer is not None:
        return AnchoredLAMB(params, **outer, **options)
    if args.optimizer == "muon":
        return CPUMuon8Bit(params, device=device, in_background=in_background, **options)
    return CPULAMB8Bit(params, **options)


def make_shared_optimizer(groups: list[dict], args: HFTrainerArguments, **options) -> CPULAMB8Bit:
    """As `make_optimizer`, with statistics in shared memory, over parameters without gradients.

    Both spare copies in the processes that are forked soon: of the statistics as they are now, and of the gradients
    that hivemind (state_averager.py, `_init_components`) gives to offloaded parameters until they get averaged ones.
    hivemind would share the statistics, too, when they are first handed out: perhaps in the middle of a step.
    """
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = None
    optimizer = make_optimizer(groups, args, **options)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    return optimizer


def outer_options(collaboration: CollaborationArguments) -> dict[str, float]:
    """Of the outer optimizer, where peers make local steps."""
    return {
        "outer_learning_rate": collaboration.outer_learning_rate,
        "outer_momentum": collaboration.outer_momentum,
    }


def make_learning_rate(args: HFTrainerArguments):
    """The share of the peak learning rate as a function of the epoch. Raises ValueError for options that contradict."""
    min_lr_ratio = DEFAULT_LR_FLOOR if args.min_learning_rate is None else args.min_learning_rate / args.learning_rate
    decay_steps = None  # from the end of the warm-up on
    if args.schedule == "wsd":
        decay_steps = decay_epochs(args.decay_steps, warmup_steps=args.warmup_steps, total_steps=args.total_steps)
    factor = partial(
        learning_rate_factor,
        total_steps=args.total_steps,
        warmup_steps=args.warmup_steps,
        num_zero_steps=args.num_zero_lr_steps,
        min_lr_ratio=min_lr_ratio,
        decay_steps=decay_steps,
    )
    factor(0)  # checks the options
    return factor


def make_collaborative_optimizer(  # noqa: PLR0913 (where all parts of the optimizer come together)
    model: torch.nn.Module,
    dht: hivemind.DHT,
    *,
    peer: PeerArguments,
    collaboration: CollaborationArguments,
    training: HFTrainerArguments,
    auxiliary: bool = False,
    shares_state: bool = True,
    metrics_path: Path | None = None,
    identity: Identity | None = None,
) -> LeanOptimizer:
    """Start the averagers of this peer. Must be called on the main thread, before other threads or data loaders start.

    They add what they are about to do to the file ``metrics_path``. An auxiliary peer has no gradients, so nothing of
    its own can be delayed; hivemind fails if asked to. One that has no state worth sharing yet passes
    ``shares_state=False``, and calls `LeanOptimizer.share_state` when it has.
    """
    learning_rate = make_learning_rate(training)
    hivemind_fixes.apply()
    vain_search = multiprocessing.Value("d", float("-inf"))
    averaging = averager_options(peer, collaboration, identity, vain_search, auxiliary=auxiliary)
    averaging["phases_path"] = metrics_path
    delay_step = collaboration.delay_optimizer_step and not auxiliary
    device = "cpu" if auxiliary else training.device
    kind, grad_averager, options = LeanOptimizer, LeanGradientAverager, {"device": device, "in_background": delay_step}
    if collaboration.local_batch_size:
        kind = partial(
            LocalStepsOptimizer,
            local_batch_size=collaboration.local_batch_size,
            local_steps_after=collaboration.local_steps_after,
        )
        grad_averager = DifferenceAverager
        options["outer"] = outer_options(collaboration)
    optimizer = kind(
        dht=dht,
        run_id=peer.run_id,
        target_batch_size=collaboration.target_batch_size,
        params=make_groups(model, training),
        optimizer=lambda params: make_shared_optimizer(params, training, **options),
        scheduler=lambda optimizer: LambdaLR(optimizer, learning_rate),
        matchmaking_time=collaboration.matchmaking_time,
        next_chunk_timeout=collaboration.next_chunk_timeout,
        averaging_timeout=collaboration.averaging_timeout,
        average_state_every=collaboration.average_state_every,
        offload_optimizer=collaboration.offload_optimizer,
        delay_optimizer_step=delay_step,
        delay_grad_averaging=collaboration.delay_grad_averaging and delay_step,
        delay_state_averaging=delay_step,
        reuse_grad_buffers=collaboration.reuse_grad_buffers or auxiliary,
        grad_compression=gradient_compression(collaboration.averaging_bits),
        state_averaging_compression=parameter_compression(),
        grad_averager_factory=partial(grad_averager, target_batch_size=collaboration.target_batch_size, **averaging),
        averager_opts={**averaging, "allow_state_sharing": None if shares_state else False},
        tracker_opts=tracker_options(dht, peer, collaboration, identity, vain_search),
        shutdown_timeout=LEAVE_SECONDS,
        client_mode=peer.is_client,
        auxiliary=auxiliary,
        verbose=logger.isEnabledFor(logging.DEBUG),
    )
    if auxiliary:  # it computes none, nor accumulates any
        for parameter in model.parameters():
            parameter.grad = None
    return optimizer


def averager_options(
    peer: PeerArguments,
    collaboration: CollaborationArguments,
    identity: Identity | None,
    vain_search: Synchronized,
    *,
    auxiliary: bool,
) -> dict:
    """What the averagers of gradients and of parameters have in common; some of it is one object for both."""
    patience = patience_seconds(
        matchmaking_time=collaboration.matchmaking_time, next_chunk_timeout=collaboration.next_chunk_timeout
    )
    return {
        "min_vector_size": peer.min_vector_size,
        "bandwidth": peer.bandwidth,
        "request_timeout": min(REQUEST_SECONDS, REQUEST_SHARE * collaboration.matchmaking_time),
        "sender_timeout": SENDER_SHARE * collaboration.next_chunk_timeout,
        "reducer_timeout": collaboration.next_chunk_timeout,
        "progress_key": f"{peer.run_id}_progress",
        "patience": Patience(math.inf if auxiliary else patience),
        "attendance": Attendance(),
        "vain_search": vain_search,
        "membership": None if identity is None else identity.membership,
        "robust_averaging": collaboration.robust_averaging,
    }


def tracker_options(
    dht: hivemind.DHT,
    peer: PeerArguments,
    collaboration: CollaborationArguments,
    identity: Identity | None,
    vain_search: Synchronized,
) -> dict:
    """How often progress is looked at, and whom it is believed."""
    shortest, longest = REFRESH_SECONDS
    refresh = min(longest, max(shortest, REFRESH_SHARE * collaboration.matchmaking_time))
    membership = None if identity is None else identity.membership
    return {
        "min_refresh_period": min(FIRST_REFRESH_SECONDS, refresh / 4),
        "default_refresh_period": min(USUAL_REFRESH_SECONDS, refresh),
        "max_refresh_period": refresh,
        "vain_search": vain_search,
        "private_key": None if identity is None else identity.private_key,
        "is_member": None if membership is None else lambda owner: not membership.is_revoked(owner),
        "ask_epoch": partial(ask_epoch, dht, peer.initial_peers),
        "tell_epoch": partial(tell_epoch, dht),
        "reachable": partial(reachable, dht),
    }
