"""Stand-ins for a swarm: a collaborative optimizer without network that records what it is given, and tiny data."""

import io
import multiprocessing
import threading
from types import SimpleNamespace

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback

from arguments import HFTrainerArguments, TrainerPeerArguments
from src import LeanAlbertConfig, LeanAlbertForPreTraining
from src.metrics.console import Progress
from src.metrics.journal import Journal
from src.metrics.records import Round, StateDownload
from src.optim.lamb import CPULAMB8Bit
from src.swarm.join import Swarm
from src.swarm.optimizer import LeanOptimizer
from src.trainer.build import make_callback
from src.trainer.data_schedule import DataSchedule
from src.trainer.hf_trainer import CollaborativeTrainer, LossMeter
from src.trainer.local_workers import LocalWorkers

VOCAB_SIZE = 300
LENGTH = 12


def tiny_model(seed: int = 0) -> LeanAlbertForPreTraining:
    """Two layers, no dropout; the word embeddings (4800 values) are the only parameter with 8-bit statistics."""
    torch.manual_seed(seed)
    return LeanAlbertForPreTraining(
        LeanAlbertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=2,
            embedding_size=16,
            vocab_size=VOCAB_SIZE,
            num_hidden_layers=2,
            share_large_matrices=1,
            classifier_dropout_prob=0.0,
        )
    )


def tiny_items(count: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of 12 tokens with 3 labels each, so that a mean over rows does not depend on how they are batched."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for row in range(count):
        input_ids = torch.randint(5, VOCAB_SIZE, (LENGTH,), generator=generator)
        labels = torch.full((LENGTH,), -100)
        places = torch.randperm(LENGTH, generator=generator)[:3]
        labels[places] = input_ids[places]
        items.append({"input_ids": input_ids, "labels": labels, "sentence_order_label": torch.tensor(row % 2)})
    return items


class EndlessItems(torch.utils.data.IterableDataset):
    """The same rows over and over."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        while True:
            yield from self.items


class FakeOptimizer:
    """Takes one global step for every ``samples_per_epoch`` samples, all of them its own, without changing parameters.

    ``steps``: (samples, copies of the gradient buffers) of each call of `step`. ``num_downloads`` counts state
    downloads, which set all parameters to ``downloaded_value`` if there is one.
    """

    def __init__(self, model, *, samples_per_epoch: int = 8, reuse_grad_buffers: bool = True, epoch: int = 0):
        self.model, self.samples_per_epoch = model, samples_per_epoch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.steps, self.rounds, self.num_downloads, self.downloaded_value = [], [], 0, None
        self.downloads, self.shares_state, self.kept = [], False, []
        self.load_state_timeout = 600.0
        self.client_mode = self.auxiliary = False
        self.refusals, self.waits = [], True
        lamb = CPULAMB8Bit(self.parameters, lr=0.5, min_8bit_size=4096)
        lamb._opt_called = True  # the schedule warns when it is stepped before the optimizer
        schedule = LambdaLR(lamb, lambda epoch: 1.0 / (1.0 + epoch))
        schedule._step_count = epoch + 1
        self.state_averager = SimpleNamespace(
            local_epoch=epoch,
            pending_updates=set(),
            optimizer=lamb,
            scheduler=schedule,
            lock_optimizer=threading.Lock(),
            lock_averaged_tensors=multiprocessing.Lock(),
            main_parameters=self.parameters,
            reuse_tensors=True,
            state_sharing_priority=0,
            step=lambda **kwargs: None,
        )
        self.grad_averager = SimpleNamespace(
            reuse_grad_buffers=reuse_grad_buffers,
            local_samples_accumulated=0,
            local_times_accumulated=0,
            reset_accumulated_grads_=self._reset_accumulated,
            state_sharing_priority=0,
        )
        self.tracker = SimpleNamespace(
            global_epoch=epoch,
            present={},
            samples_per_second=12.0,
            global_progress=SimpleNamespace(
                num_peers=1, samples_accumulated=3, target_batch_size=samples_per_epoch, eta_next_epoch=0.0
            ),
            performance_ema=SimpleNamespace(samples_per_second=2.5),
            reported=[],
            announced=0,
            announce=self._announce,
            highest_plausible_epoch=lambda: float("inf"),
            num_present=lambda: self.tracker.global_progress.num_peers,
            report_local_progress=lambda epoch, samples_accumulated: self.tracker.reported.append(
                (epoch, samples_accumulated)
            ),
        )

    @property
    def local_epoch(self) -> int:
        return self.state_averager.local_epoch

    def _announce(self) -> None:
        self.tracker.announced += 1

    def _reset_accumulated(self) -> None:
        self.grad_averager.local_samples_accumulated = self.grad_averager.local_times_accumulated = 0
        if self.grad_averager.reuse_grad_buffers:
            for parameter in self.parameters:
                parameter.grad.zero_()

    def step(self, batch_size: int) -> None:
        self.steps.append((batch_size, {n: p.grad.clone() for n, p in self.model.named_parameters()}))
        self.grad_averager.local_samples_accumulated += batch_size
        self.grad_averager.local_times_accumulated += 1
        if self.grad_averager.local_samples_accumulated >= self.samples_per_epoch:
            self.state_averager.local_epoch += 1
            self.state_averager.scheduler.step()
            self.tracker.global_epoch = self.local_epoch
            self.rounds.append(Round("gradients", 0.5, num_peers=2, received=1.0))
            self._reset_accumulated()

    makes_local_steps, inner_steps = False, 0
    discard_gradients = LeanOptimizer.discard_gradients
    forget_local_work = LeanOptimizer.forget_local_work

    def take_refusals(self) -> list[tuple[str, str]]:
        refusals, self.refusals = self.refusals, []
        return refusals

    def finished_rounds(self) -> list[Round]:
        rounds, self.rounds = self.rounds, []
        return rounds

    def finished_downloads(self) -> list[StateDownload]:
        downloads, self.downloads = self.downloads, []
        return downloads

    def stop_waiting(self) -> None:
        self.waits = False

    def keep_state(self, epoch: int) -> None:
        self.kept.append(epoch)

    def share_state(self) -> None:
        self.shares_state = True

    @torch.no_grad()
    def load_state_from_peers(self) -> None:
        self.num_downloads += 1
        self.state_averager.has_taken_state = self.downloaded_value is not None
        if self.downloaded_value is not None:
            for parameter in self.parameters:
                parameter.fill_(self.downloaded_value)


class FakeDHT:
    """Keeps what is stored; every value is there at once."""

    def __init__(self):
        self.records: dict[str, dict] = {}

    def store(self, key, subkey, value, **kwargs) -> None:
        self.records.setdefault(key, {})[subkey] = SimpleNamespace(value=value)

    def get(self, key, latest):
        return SimpleNamespace(value=self.records[key]) if key in self.records else None


def stack(items) -> dict[str, torch.Tensor]:
    """A collator for rows of equal length."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def make_trainer(folder, optimizer: FakeOptimizer, *, items=None, scaler=None, dht=None, wait_for_peers=1, **training):
    """A trainer and its callback as run_trainer.py makes them, around a fake optimizer; metrics go to ``folder``."""
    options = {
        "per_device_train_batch_size": 4, "max_sequence_length": 64, "initial_sequence_length": 16,
        "sequence_length_warmup_steps": 3, "pad_to_multiple_of": 8, "total_steps": 100, "warmup_steps": 0,
    }  # fmt: skip
    arguments = HFTrainerArguments(output_dir=str(folder), use_cpu=True, **{**options, **training})
    meter, stop = LossMeter(), threading.Event()
    peer = TrainerPeerArguments(run_id="fake", backup_every_epochs=2, wait_for_peers=wait_for_peers)
    callback = make_callback(
        Swarm(dht or FakeDHT(), b"key", optimizer),
        optimizer.model,
        Journal(folder / "metrics.jsonl"),
        peer=peer,
        training=arguments,
        meter=meter,
        scaler=scaler,
        schedule=DataSchedule(arguments),
        state_path=folder / "backup.pth",
        progress=Progress(io.StringIO()),
        stop=stop,
        workers=LocalWorkers(),
    )
    trainer = CollaborativeTrainer(
        collaborative=optimizer,
        meter=meter,
        scaler=scaler,
        stop=stop,
        model=optimizer.model,
        args=arguments,
        train_dataset=EndlessItems(items or tiny_items(16)),
        data_collator=stack,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, callback
