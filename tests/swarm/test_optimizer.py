"""Which parameters decay, which learning rate an epoch has, and which gradients the optimizer steps with."""

import inspect
import time
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace

import hivemind
import pytest
import torch
from hivemind.compression import BlockwiseQuantization, CompressionInfo, Float16Compression
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.utils.crypto import RSAPrivateKey
from transformers import Trainer

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments
from src import LeanAlbertConfig, LeanAlbertForPreTraining
from src.optim.parameter_groups import parameter_groups
from src.swarm.averagers import LeanGradientAverager, LeanStateAverager, read_introductions
from src.swarm.build import (
    make_collaborative_optimizer,
    make_groups,
    make_learning_rate,
    make_shared_optimizer,
    patience_seconds,
)
from src.swarm.optimizer import LeanOptimizer
from src.swarm.patience import Patience
from src.swarm.rounds import SHORTEST_ROUND
from tests.reference.node import start_node


def tiny_model(**kwargs) -> LeanAlbertForPreTraining:
    config = LeanAlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        share_large_matrices=1,
        sandwich_norm=True,
        adapter_dim=2,
        **kwargs,
    )
    return LeanAlbertForPreTraining(config)


def test_parameter_groups_hold_every_trainable_parameter_exactly_once():
    model = tiny_model()
    frozen = model.albert.embeddings.token_type_embeddings.weight
    frozen.requires_grad_(False)
    grouped = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()} - {id(frozen)}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) > len(grouped) + 1, "this model shares no matrices, so the test shows nothing"


def test_optimizer_has_nothing_of_which_forked_processes_would_keep_a_copy(tmp_path):
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (3, 2**20)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_shared_optimizer([{"params": parameters}], training_arguments(tmp_path))
    statistics = [
        value for one in optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)
    ]
    assert len(statistics) == 2 + 4 and all(value.is_shared() for value in statistics)
    assert [parameter.grad for parameter in parameters] == [None, None]


def test_parameter_groups_exempt_biases_and_norms_from_weight_decay():
    model = tiny_model()
    decayed, exempt = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norm_parameters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
        for parameter in module.parameters()
    }
    assert norm_parameters
    for parameter in exempt["params"]:
        assert parameter.ndim == 1, names[id(parameter)]
    for parameter in decayed["params"]:
        assert parameter.ndim == 2 and id(parameter) not in norm_parameters, names[id(parameter)]


def training_arguments(tmp_path, **kwargs) -> HFTrainerArguments:
    return HFTrainerArguments(output_dir=str(tmp_path), use_cpu=True, **kwargs)


@pytest.mark.parametrize(
    ("options", "table"),
    [
        # default: zero up to epoch 49, then up to the peak at 3125, down to 2 % of it
        ({}, {0: 0, 49: 0, 50: 0, 3125: 2.5e-3, 9375: 1.25e-3, 15_312: 6.26e-5, 15_624: 5e-5, 15_625: 5e-5}),
        ({"min_learning_rate": 1e-3}, {0: 0, 3125: 2.5e-3, 9374: 1.2502e-3, 10_625: 1e-3, 20_000: 1e-3}),
        ({"min_learning_rate": 0.0}, {15_625: 0.0, 9375: 1.25e-3}),
        (
            {"learning_rate": 1e-2, "num_zero_lr_steps": 0, "warmup_steps": 10, "total_steps": 20},
            {0: 0, 1: 1e-3, 10: 1e-2, 15: 5e-3, 20: 2e-4},
        ),
    ],
    ids=["defaults", "floor", "no floor", "short"],
)
def test_learning_rate_of_an_epoch(tmp_path, options, table):
    arguments = training_arguments(tmp_path, **options)
    factor = make_learning_rate(arguments)
    for epoch, expected in table.items():
        assert arguments.learning_rate * factor(epoch) == pytest.approx(expected, rel=1e-4, abs=1e-12), epoch


@pytest.mark.parametrize("options", [{"warmup_steps": 100, "total_steps": 50}, {"min_learning_rate": 1.0}])
def test_learning_rate_options_that_contradict_are_an_error_at_the_start(tmp_path, options):
    with pytest.raises(ValueError, match=r"^--(warmup_steps|min_learning_rate) .* must lie between 0 and --"):
        make_learning_rate(training_arguments(tmp_path, **options))


def test_wsd_stays_at_the_peak_and_falls_in_its_last_epochs(tmp_path):
    options = {"learning_rate": 1e-2, "num_zero_lr_steps": 0, "warmup_steps": 10, "total_steps": 100}
    given = make_learning_rate(training_arguments(tmp_path, schedule="wsd", decay_steps=30, **options))
    usual = make_learning_rate(training_arguments(tmp_path, schedule="wsd", **options))
    assert [given(epoch) for epoch in (5, 10, 70, 85, 100)] == pytest.approx([0.5, 1, 1, 0.5, 0.02])
    assert [usual(epoch) for epoch in (5, 10, 80, 90, 100)] == pytest.approx([0.5, 1, 1, 0.5, 0.02])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": 5}, "--decay_steps 5 needs --schedule wsd"),
        ({"schedule": "wsd", "decay_steps": 91}, "--decay_steps 91 must lie between 1 and the 90 epochs"),
        ({"mlm_probability": 1.0}, "--mlm_probability 1.0 must lie between 0 and 1"),
        ({"final_mlm_probability": 0.0}, "--final_mlm_probability 0.0 must lie between 0 and 1"),
    ],
)
def test_options_of_a_recipe_that_make_no_sense_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        training_arguments(tmp_path, warmup_steps=10, total_steps=100, **options)


def test_muon_needs_a_model_with_dense_matrices(tmp_path):
    training = training_arguments(tmp_path, optimizer="muon")
    assert [group.get("num_parts") for group in make_groups(tiny_model(), training)] == [None, None, 1, 3]
    with pytest.raises(ValueError, match=r"^--optimizer muon: .* train it with lamb"):
        make_groups(tiny_model(block_size=4), training)


def test_state_averager_prepares_a_step_before_it_takes_the_locks(monkeypatch):
    """Muon's products take minutes at the published size: others must have the state, and backups, meanwhile."""
    order = []
    optimizer = SimpleNamespace(prepare=lambda: order.append("prepare"))
    averager = object.__new__(LeanStateAverager)  # without its process
    averager.optimizer = optimizer

    def do(self, wait_for_trigger, optimizer_step, *args, **kwargs):
        if wait_for_trigger is not None:
            wait_for_trigger()
        order.append("locked")

    monkeypatch.setattr(TrainingStateAverager, "_do", do)
    averager._do(lambda: order.append("gradients"), True)
    averager._do(None, False)
    assert order == ["gradients", "prepare", "locked", "locked"]


@pytest.fixture(scope="module")
def dht():
    node, _ = start_node("optimizer", key=RSAPrivateKey.process_wide())
    yield node
    node.shutdown()


TARGET = 8
MODES = {
    "all in the background": {},
    "averaging in the foreground": {"delay_grad_averaging": False},
    "own buffers": {"reuse_grad_buffers": False},
    "no delay, no offload": {
        "offload_optimizer": False,
        "delay_optimizer_step": False,
        "delay_grad_averaging": False,
    },
    "no delay, no offload, own buffers": {
        "offload_optimizer": False,
        "delay_optimizer_step": False,
        "delay_grad_averaging": False,
        "reuse_grad_buffers": False,
    },
}


@pytest.fixture
def start_optimizer(dht, tmp_path, shut_down_at_end):
    """Starts the optimizer of a peer that is alone, over one matrix; it records the gradients it steps with."""

    def start(*, auxiliary: bool = False, **collaboration) -> LeanOptimizer:
        model = torch.nn.Linear(4, 3, bias=False)
        run_id = "alone-" + "".join(filter(str.isalnum, tmp_path.name))  # tests share one DHT node
        optimizer = make_collaborative_optimizer(
            model,
            dht,
            peer=PeerArguments(run_id=run_id, min_vector_size=1),
            collaboration=CollaborationArguments(
                target_batch_size=TARGET,
                matchmaking_time=1.5,
                next_chunk_timeout=4,
                averaging_timeout=10,
                **collaboration,
            ),
            training=training_arguments(tmp_path, num_zero_lr_steps=0, warmup_steps=0, total_steps=100),
            auxiliary=auxiliary,
        )
        shut_down_at_end(optimizer)
        optimizer.model, optimizer.used_gradients = model, []

        def record(inner, args, kwargs) -> None:
            (parameter,) = (p for group in inner.param_groups for p in group["params"])
            optimizer.used_gradients.append(parameter.grad.clone())

        optimizer.state_averager.optimizer.register_step_pre_hook(record)
        return optimizer

    return start


def train_until_epoch(optimizer: LeanOptimizer, epoch: int, gradient: torch.Tensor, *, timeout: float = 60.0) -> int:
    """Steps with one and the same gradient for every batch of two samples; returns how many it took."""
    give_up_at, batches = time.monotonic() + timeout, 0
    parameter = optimizer.model.weight
    while optimizer.local_epoch < epoch:
        assert time.monotonic() < give_up_at, "the epoch does not end"
        if optimizer.grad_averager.reuse_grad_buffers:
            parameter.grad += gradient
        else:
            parameter.grad = gradient.clone()
        optimizer.step(batch_size=2)
        batches += 1
        time.sleep(0.05)
    optimizer.state_averager.step(wait_for_delayed_updates=True)
    return batches


@pytest.mark.parametrize("mode", MODES)
def test_optimizer_alone_steps_with_the_mean_of_its_own_gradients(start_optimizer, mode):
    optimizer = start_optimizer(**MODES[mode])
    before = optimizer.model.weight.detach().clone()
    gradient = torch.arange(12.0).reshape(3, 4) / 1000  # far below max_grad_norm
    assert train_until_epoch(optimizer, 1, gradient) > 1
    assert optimizer.scheduled_grads is None and optimizer.scheduled_state is None, "looked for partners while alone"
    (used,) = optimizer.used_gradients
    torch.testing.assert_close(used, gradient, rtol=1e-5, atol=1e-9)
    moved = optimizer.model.weight.detach() - before
    assert moved.isfinite().all() and float(moved.norm()) > 0
    assert optimizer.finished_rounds() == []


@pytest.mark.parametrize("mode", ["all in the background", "no delay, no offload"])
def test_optimizer_steps_with_own_gradients_after_a_failed_round(start_optimizer, mode):
    optimizer = start_optimizer(**MODES[mode])
    averager, parameter = optimizer.grad_averager, optimizer.model.weight
    own = torch.full((3, 4), 0.01)
    for _ in range(2):
        parameter.grad += own
        averager.accumulate_grads_(2)
    # what hivemind does when a round begins, and what the next epoch's first batch adds while it is under way
    averager.load_accumulators_into_averager_()
    averager.reset_accumulated_grads_()
    parameter.grad += torch.full((3, 4), 7.0)
    averager.accumulate_grads_(2)
    failed = Future()
    failed.set_exception(TimeoutError("no partner"))

    optimizer._average_gradients_and_load_into_optimizer(failed)

    (optimized,) = (p for group in optimizer.state_averager.optimizer.param_groups for p in group["params"])
    torch.testing.assert_close(optimized.grad, own)


def bare_optimizer(num_peers: int) -> LeanOptimizer:
    """An optimizer without processes whose epoch is about to end."""
    optimizer = LeanOptimizer.__new__(LeanOptimizer)
    optimizer._parent_pid = None  # hivemind's __del__ leaves it alone
    optimizer.grad_averager = SimpleNamespace()
    optimizer.state_averager = SimpleNamespace(_update_scheduler=lambda: None, lacks_epochs=False)
    optimizer.tracker = SimpleNamespace(
        global_progress=SimpleNamespace(num_peers=num_peers), estimated_next_update_time=0.0, global_epoch=0
    )
    optimizer.matchmaking_time, optimizer.averaging_timeout, optimizer.average_state_every = 1.0, 10.0, 1
    optimizer.scheduled_grads = optimizer.scheduled_state = None
    optimizer.delay_before_state_averaging = SimpleNamespace(num_updates=1, ema_seconds_per_sample=0.0)
    optimizer.status_loglevel = 0
    return optimizer


def test_optimizer_looks_for_no_group_before_its_epoch_ends():
    optimizer = bare_optimizer(num_peers=2)  # with hivemind's own methods this fails: the averagers cannot do anything
    optimizer._maybe_schedule_gradient_averaging()
    optimizer._maybe_schedule_state_averaging()
    assert optimizer.scheduled_grads is None and optimizer.scheduled_state is None


def test_assistant_always_looks_for_both_kinds_of_rounds_and_once_for_each():
    optimizer, begun = bare_optimizer(num_peers=2), []

    def averager(kind: str):
        def assist(*, ahead: float):
            begun.append((kind, ahead, Future()))
            return begun[-1][-1]

        return SimpleNamespace(round_kind=kind, assist=assist)

    optimizer._assisting = {}
    optimizer.grad_averager, optimizer.state_averager = averager("gradients"), averager("parameters")
    for _ in range(2):
        optimizer.assist()
    assert {(kind, ahead) for kind, ahead, _ in begun} == {("gradients", 10.0), ("parameters", 10.0)}
    begun[0][-1].set_exception(RuntimeError("nobody came"))
    optimizer.assist()
    assert len(begun) == 3 and begun[2][0] == begun[0][0]


@pytest.mark.parametrize(("error", "gives_up"), [(CancelledError(), True), (TimeoutError(), False)])
def test_optimizer_that_found_nobody_for_gradients_looks_for_nobody_for_parameters(monkeypatch, error, gives_up):
    optimizer, failed = bare_optimizer(num_peers=2), Future()
    optimizer.grad_averager.patience = Patience(10.0)
    monkeypatch.setattr(LeanOptimizer, "_load_averaged_gradients_into_optimizer_", lambda self: None)
    failed.set_exception(error)
    optimizer._average_gradients_and_load_into_optimizer(failed)
    assert (optimizer._patience.spent == float("inf")) is gives_up


def test_optimizer_averages_although_the_last_round_s_handle_was_not_replaced():
    optimizer = bare_optimizer(num_peers=2)
    optimizer.scheduled_grads = SimpleNamespace(triggered=True, done=lambda: True)
    steps = []
    optimizer.grad_averager.step = lambda **kwargs: steps.append(kwargs) or "new round"
    assert optimizer._begin_averaging_gradients(None)
    assert [step["control"] for step in steps] == [None]
    assert optimizer.scheduled_grads == "new round"


def test_auxiliary_optimizer_delays_nothing_shares_no_state_and_holds_no_gradients(start_optimizer):
    optimizer = start_optimizer(auxiliary=True)
    assert not optimizer.delay_optimizer_step and not optimizer.delay_grad_averaging
    assert not optimizer.delay_state_averaging
    assert not optimizer.state_averager.allow_state_sharing
    assert optimizer.grad_averager._local_accumulators is None
    assert all(parameter.grad is None for parameter in optimizer.state_averager.main_parameters)


def test_optimizer_hands_the_run_settings_to_both_averagers(start_optimizer):
    optimizer = start_optimizer()
    assert type(optimizer.grad_averager) is LeanGradientAverager
    assert type(optimizer.state_averager) is LeanStateAverager
    for averager in (optimizer.grad_averager, optimizer.state_averager):
        assert averager.allreduce_kwargs["min_vector_size"] == 1
        assert 0 < averager.matchmaking_kwargs["request_timeout"] < 1.5  # else peers wait for each other
        # all of a round that waits for a silent peer, as sender or as reducer, is over after --next_chunk_timeout
        assert (averager.allreduce_kwargs["sender_timeout"], averager.allreduce_kwargs["reducer_timeout"]) == (3, 4)
        assert averager.patience is optimizer.grad_averager.patience
        assert averager.patience.seconds == pytest.approx(1.5 + 5 + 4 / 3)
        assert averager._vain_search is optimizer.tracker._vain_search
        assert averager.attendance is optimizer.grad_averager.attendance
        assert averager._progress_key == optimizer.tracker.training_progress_key
    of_gradients = optimizer.grad_averager.allreduce_kwargs["compression"]
    for size, expected in ((2**16, Float16Compression), (2**16 + 1, BlockwiseQuantization)):
        chosen = of_gradients.choose_compression(CompressionInfo.from_tensor(torch.empty(size)))
        assert type(chosen) is expected
    assert type(optimizer.state_averager.allreduce_kwargs["compression"]) is Float16Compression


def test_schedule_follows_the_epoch_that_a_state_is_counted_as(start_optimizer, monkeypatch):
    """hivemind counts it as one of the next epoch when the swarm is about to be there."""
    optimizer = start_optimizer()
    monkeypatch.setattr(
        hivemind.Optimizer, "load_state_from_peers", lambda self: setattr(self.state_averager, "local_epoch", 5)
    )
    optimizer.load_state_from_peers()
    assert optimizer.state_averager.scheduler._step_count - 1 == optimizer.local_epoch == 5


def test_trainer_still_has_the_internals_we_build_on():
    for name in ("_clip_grad_norm", "_get_grad_norm", "training_step", "compute_loss", "get_train_dataloader"):
        assert hasattr(Trainer, name), f"transformers' Trainer.{name} is gone; look for its uses in src/trainer"


@pytest.mark.parametrize(
    ("owner", "calls"),
    [
        (
            hivemind.Optimizer,
            [
                "self._make_state_averager(",
                "self._make_gradient_averager(",
                "self._should_load_state_from_peers(",
                "self._update_global_epoch(",
                "self._maybe_schedule_gradient_averaging(",
                "self._maybe_schedule_state_averaging(",
                "self._begin_averaging_gradients(",
                "self._average_gradients_and_load_into_optimizer",
            ],
        ),
        (Trainer, ["self._clip_grad_norm(", "self._get_grad_norm(", "self.get_train_dataloader("]),
    ],
    ids=["hivemind", "transformers"],
)
def test_libraries_still_call_the_methods_we_override(owner, calls):
    source = inspect.getsource(owner)
    for call in calls:
        assert call in source, f"{owner.__name__} no longer calls {call}...): our override has no effect"


@pytest.mark.parametrize("delayed", [True, False])
def test_optimizer_says_that_an_epoch_ends_when_no_update_is_under_way(monkeypatch, delayed):
    order = []
    optimizer = LeanOptimizer.__new__(LeanOptimizer)
    optimizer._parent_pid, optimizer.delay_optimizer_step, optimizer.auxiliary = None, delayed, False
    optimizer._should_check_synchronization_on_update = False
    optimizer.tracker = SimpleNamespace(global_epoch=3)
    optimizer.state_averager = SimpleNamespace(local_epoch=3, step=lambda **options: order.append(options))
    optimizer.grad_averager = SimpleNamespace(patience=Patience(10.0))
    optimizer.grad_averager.patience.spend(9.0)  # at the end of the last epoch
    optimizer.before_epoch_ends = lambda: order.append("epoch ends")
    monkeypatch.setattr(hivemind.Optimizer, "_update_global_epoch", lambda self, scaler: order.append("update"))
    optimizer._update_global_epoch(None)
    assert order == [{"wait_for_delayed_updates": True}] * delayed + ["epoch ends", "update"]
    assert optimizer.grad_averager.patience.spent == 0


@pytest.mark.parametrize(
    ("epochs", "of_swarm", "loads"),
    [
        ({"me": 3, "trainer": 4, "auxiliary": None}, 5, True),  # both have ended their epochs: 4 here, 5 there
        ({"me": 3, "trainer": 4, "auxiliary": None}, 4, False),  # what the trainer began, it gave up
        ({"me": 3, "trainer": 3, "auxiliary": None}, 5, False),  # it has just ended the next one: normal
        ({"me": 3, "trainer": 2}, 4, False),  # it is the other one that must catch up
    ],
)
def test_optimizer_does_not_stay_behind_those_it_averages_with(monkeypatch, epochs, of_swarm, loads):
    done = []
    optimizer = LeanOptimizer.__new__(LeanOptimizer)
    optimizer._parent_pid, optimizer.delay_optimizer_step, optimizer.auxiliary = None, False, False
    optimizer._should_check_synchronization_on_update = False
    optimizer.grad_averager = SimpleNamespace(peer_id="me", patience=Patience())
    optimizer.tracker = SimpleNamespace(global_epoch=of_swarm)
    optimizer.state_averager = SimpleNamespace(local_epoch=4)
    optimizer.before_epoch_ends = lambda: None
    monkeypatch.setattr(hivemind.Optimizer, "_update_global_epoch", lambda self, scaler: done.append("update"))
    monkeypatch.setattr(LeanOptimizer, "load_state_from_peers", lambda self: done.append("load"))
    optimizer._notice_partners_ahead(epochs)
    optimizer._update_global_epoch(None)
    optimizer._update_global_epoch(None)
    assert done == (["load", "update"] if loads else ["update", "update"])


@pytest.mark.parametrize(("global_epoch", "loads"), [(4, True), (3, False)])
def test_optimizer_that_came_when_the_others_had_gone_on_takes_their_state(monkeypatch, global_epoch, loads):
    optimizer, failed = bare_optimizer(num_peers=2), Future()
    optimizer.delay_optimizer_step, optimizer.auxiliary = False, False
    optimizer.grad_averager.patience = Patience(10.0)
    optimizer.tracker.global_epoch, optimizer.state_averager.local_epoch = global_epoch, 3
    optimizer.before_epoch_ends = lambda: None
    blocked = []
    monkeypatch.setattr(hivemind.Optimizer, "_update_global_epoch",
                        lambda self, scaler: blocked.append(self._patience.owner_is_blocked))  # fmt: skip
    monkeypatch.setattr(LeanOptimizer, "_load_averaged_gradients_into_optimizer_", lambda self: None)
    assert not optimizer._should_load_state_from_peers(), "they may be looking for it"
    optimizer._update_global_epoch(None)
    assert blocked == [True] and not optimizer._patience.owner_is_blocked
    failed.set_exception(CancelledError())
    optimizer._average_gradients_and_load_into_optimizer(failed)
    optimizer.state_averager.local_epoch = 4
    assert [optimizer._should_load_state_from_peers() for _ in range(2)] == [loads, False]


def test_records_of_the_partners_of_a_round_are_kept_before_those_of_strangers(monkeypatch):
    optimizer, kept = bare_optimizer(num_peers=2), []
    optimizer.dht, optimizer.grad_averager.peer_id = "node", "me"
    monkeypatch.setattr("src.swarm.optimizer.befriend", lambda dht, peers: kept.append((dht, set(peers))))
    monkeypatch.setattr(LeanOptimizer, "_load_averaged_gradients_into_optimizer_", lambda self: None)
    for members in ({"me": 3, "other": 3}, {"me": 4, "other": 4}, {"me": 5, "other": 5, "auxiliary": None}):
        result = Future()
        result.set_result(members)
        optimizer._average_gradients_and_load_into_optimizer(result)
    assert kept == [("node", {"me", "other"}), ("node", {"auxiliary"})]


class Round(dict):
    def __init__(self, members: dict, received: float = 1.0):
        super().__init__(members)
        self.received = received


@pytest.mark.parametrize("has_delay", [False, True])
def test_parameters_are_averaged_after_a_round_that_one_member_did_not_get_all_of(monkeypatch, has_delay):
    """It says so in its next round, so that all of them know, and do it in the same epoch; else every 20th."""
    of_epochs = {1: 1.0, 2: 0.7, 3: 1.0, 4: 1.0, 5: None, 6: 1.0}  # what the first of two gets; None: no round
    averaged, peers = {"one": [], "other": []}, {}
    for name in averaged:
        peers[name] = optimizer = bare_optimizer(num_peers=2)
        optimizer.grad_averager.peer_id, optimizer.average_state_every = name, 20
        optimizer.grad_averager.patience, optimizer.before_epoch_ends = Patience(), lambda: None
        optimizer.delay_optimizer_step, optimizer.auxiliary, optimizer.dht = False, False, None
        optimizer._partners = frozenset(averaged)
    monkeypatch.setattr(LeanOptimizer, "_load_averaged_gradients_into_optimizer_", lambda self: None)
    monkeypatch.setattr(LeanOptimizer, "_should_load_state_from_peers", lambda self: False)

    def end_epoch(self, scaler):
        """As hivemind's, but that delayed rounds are over at once."""
        if not has_delay:
            self._average_gradients_and_load_into_optimizer(self.under_way)
        if (self.local_epoch + 1) % self.average_state_every == 0:
            averaged[self.grad_averager.peer_id].append(self.local_epoch)
        self.state_averager.local_epoch += 1

    monkeypatch.setattr(hivemind.Optimizer, "_update_global_epoch", end_epoch)
    for epoch, received in of_epochs.items():
        said = {name: LeanGradientAverager.introduction(SimpleNamespace(local_epoch=lambda epoch=epoch: epoch,
                is_apart=peer._is_news_that_it_is_apart)) for name, peer in peers.items()}  # fmt: skip
        for name, peer in peers.items():
            peer.state_averager.local_epoch = epoch
            peer.under_way = Future()
            if name == "other":
                peer.under_way.set_result(Round(said))
            elif received is None:
                peer.under_way.set_exception(TimeoutError("lost"))
            else:
                peer.under_way.set_result(Round(said, received))
            peer._update_global_epoch(None)
            if has_delay:
                peer._average_gradients_and_load_into_optimizer(peer.under_way)
    assert averaged["one"] == averaged["other"] == ([4] if has_delay else [3, 6])


def test_nonsense_that_a_member_says_of_itself_in_a_round_means_nothing():
    members = {"a": 3, "b": [4, True], "h": [6, False], "c": [5, 1], "d": [1, True, 2], "e": None, "f": "x", "g": {}}
    assert read_introductions(members) == ({**members, "b": 4, "h": 6}, True)
    assert read_introductions({"h": [6, False]}) == ({"h": 6}, False)
    assert read_introductions(None) == ({}, False)


def test_optimizer_tells_its_epoch_to_those_it_averages_with(start_optimizer):
    optimizer = start_optimizer()
    optimizer.state_averager.local_epoch = 7
    control = optimizer.grad_averager.schedule_step(timeout=5.0)
    data = optimizer.grad_averager.serializer.loads(control.data_for_gather)
    control.cancel()
    assert optimizer.grad_averager.serializer.loads(data[-1]) == 7


@pytest.mark.parametrize(
    ("matchmaking_time", "next_chunk_timeout", "seconds"), [(1.5, 8, 10), (15, 30, 32), (60, 60, 85)]
)
def test_patience_leaves_time_for_a_round_after_a_whole_search(matchmaking_time, next_chunk_timeout, seconds):
    patience = patience_seconds(matchmaking_time=matchmaking_time, next_chunk_timeout=next_chunk_timeout)
    assert patience == pytest.approx(seconds)
    assert patience - SHORTEST_ROUND * next_chunk_timeout >= matchmaking_time + 5 - 1e-9


@pytest.mark.parametrize("leave", ["load_state_from_peers", "shutdown"])
def test_optimizer_that_leaves_an_epoch_waits_for_no_search(monkeypatch, leave):
    optimizer, seen = LeanOptimizer.__new__(LeanOptimizer), []
    optimizer._parent_pid, optimizer._downloads, optimizer._failed_downloads = None, [], 0
    optimizer.state_averager = SimpleNamespace(local_epoch=4, _update_scheduler=lambda: None, lacks_epochs=False)
    optimizer.scheduled_state = None
    optimizer.grad_averager = SimpleNamespace(local_samples_accumulated=0, patience=Patience(10.0))
    optimizer.tracker = SimpleNamespace(global_epoch=4, has_trained=True, is_apart=False)
    # what hivemind does first is to wait for them
    monkeypatch.setattr(hivemind.Optimizer, leave, lambda self: seen.append(self.grad_averager.patience.spent))
    getattr(optimizer, leave)()
    assert seen == [float("inf")] and optimizer._patience.is_over == (leave == "shutdown")
