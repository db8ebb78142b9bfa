"""Put an auxiliary peer together: the model comes from its task, all else from here.

``peer``, ``collaboration`` and ``training``: the parsed arguments of `run_aux_peer.py`; ``task``: `tasks.mlm.task`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi

from arguments import AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments, run_settings
from src.auxiliary.assistant import AveragingAssistant
from src.auxiliary.checkpoints import CheckpointNotice, CheckpointStore
from src.auxiliary.evaluator import Evaluator
from src.auxiliary.run_end import RunEnd
from src.auxiliary.uploader import Uploader, make_public
from src.metrics.console import Progress
from src.metrics.journal import Journal, claim_run_directory
from src.metrics.report import Reporter
from src.models.fastest import use_cpu_kernels
from src.models.hub import ASK_SECONDS, check_token, give_up_on_silence
from src.preflight.machine import Workload, check_uploads, needed_memory, require_shared_memory
from src.preflight.network import Seen
from src.preflight.plan import Circumstances, Plan, make_plan
from src.preflight.run import run_checks
from src.process.same_peer import keep_ports, take_up_identity
from src.settings.folder import folder_of, says_where_settings_came_from
from src.settings.manifest import Manifest
from src.swarm.join import Entry, Swarm, begin_to_hand_over, join_run, record_start, start_averaging
from src.swarm.run_card import make_run_card


@dataclass(frozen=True)
class MakeScorers:
    """`tasks.mlm.evaluate.checkpoint_scorer` and `tasks.rublimp.checkpoints.pair_scorer`, or what has their arguments:
    each reads its data, and makes a function that scores a checkpoint's directory."""

    held_out: Callable
    pairs: Callable

    def of(
        self, peer: AuxiliaryPeerArguments, tokenizer, *, num_batches: int, sentence_order: bool
    ) -> tuple[Callable | None, ...]:
        """The two scorers, as far as the peer's flags ask for them."""
        held_out = pairs = None
        if peer.eval_sources:
            held_out = self.held_out(
                tokenizer, peer.eval_sources, num_batches=num_batches, sentence_order=sentence_order
            )
        if peer.eval_pairs:
            pairs = self.pairs(tokenizer, peer.eval_pairs, pairs_each=peer.eval_pairs_each)
        return held_out, pairs


@dataclass
class AuxiliaryProgram:
    """All that a running auxiliary peer consists of; ``threads`` are to be started."""

    swarm: Swarm
    journal: Journal
    store: CheckpointStore | None
    threads: list[threading.Thread]
    end: RunEnd
    manifest: Manifest | None


def check(
    peer: AuxiliaryPeerArguments,
    collaboration: CollaborationArguments,
    training: HFTrainerArguments,
    *,
    task,
    make_scorers: MakeScorers,
    say: Callable[[str], None],
) -> int:
    """Test this machine's set-up without joining the run; returns the exit code."""

    def plan(built, data, seen: Seen, fits: bool) -> Plan:
        now = Circumstances(
            num_trainers=max(1, seen.num_trainers),
            others_per_second=seen.samples_per_second,
            bandwidth=peer.bandwidth if isinstance(peer.bandwidth, float) else seen.bandwidth,
            epoch=seen.epoch,
            is_trainer=False,
            averages=peer.assist_in_averaging,
            why_no_pace="no trainer is there yet",
        )
        return make_plan(built[0].config, settings, now, needed_memory(built[0].config, workload, on_gpu=False))

    reads_data = bool(peer.eval_sources or peer.eval_pairs)
    workload = Workload(
        training.min_8bit_size, optimizer=training.optimizer, local_steps=bool(collaboration.local_batch_size)
    )
    settings = run_settings(peer, collaboration, training)
    return run_checks(
        peer,
        output_dir=training.output_dir,
        device=torch.device("cpu"),
        workload=workload,
        build_model=lambda: build_model(peer, training, task),
        make_card=partial(make_run_card, settings=settings, trainer=False),
        read_data=partial(make_scorers.of, peer, num_batches=1, sentence_order=training.sentence_order)
        if reads_data
        else None,
        check_uploads=partial(check_uploads, HfApi(), peer.repo_url) if peer.repo_url else None,
        plan=plan,
        fastest=collaboration.target_batch_size,
        say=say,
    )


def build_model(peer: AuxiliaryPeerArguments, training: HFTrainerArguments, task) -> tuple:
    """The model whose parameters this peer looks after, and its tokenizer."""
    with says_where_settings_came_from(folder_of(training.output_dir, peer.run_id), peer.model_config_path):
        return task.build_model(peer, seed=training.seed, sentence_order=training.sentence_order)


def build(
    peer: AuxiliaryPeerArguments,
    collaboration: CollaborationArguments,
    training: HFTrainerArguments,
    *,
    entry: Entry,
    task,
    make_scorers: MakeScorers,
    progress: Progress,
    stop: threading.Event,
) -> AuxiliaryProgram:
    """hivemind forks its processes here, so this comes before threads are started. Raises ValueError and OSError.

    ``entry``: from `src.swarm.join.enter`.
    """
    use_cpu_kernels(training.cpu_kernels)
    model, tokenizer = build_model(peer, training, task)
    if peer.repo_url:
        require_token(peer.repo_url, say=progress.say)
    require_shared_memory(model, local_steps=bool(collaboration.local_batch_size))
    directory = claim_run_directory(training.output_dir, peer.run_id, "aux")
    settings = run_settings(peer, collaboration, training)
    if peer.restart:
        take_up_identity(peer)
    node = join_run(model, tokenizer, settings, entry=entry, peer=peer, trainer=False, say=progress.say)
    if peer.restart:
        keep_ports(peer, node.dht)
    evaluate, judge_pairs = make_scorers.of(
        peer, tokenizer, num_batches=peer.eval_batches, sentence_order=training.sentence_order
    )
    swarm, journal = start_averaging(
        node,
        model,
        directory / "metrics.jsonl",
        peer=peer,
        collaboration=collaboration,
        training=training,
        auxiliary=True,
    )
    report = directory / "report.html"
    reporter = Reporter(journal.path, report, interval=peer.report_interval, progress=progress, stop=stop)
    assistant = notice = evaluator = uploader = store = None
    if peer.assist_in_averaging:
        assistant = AveragingAssistant(swarm.optimizer, journal, period=peer.assist_refresh, stop=stop)
    if peer.store_checkpoints:
        store = CheckpointStore(
            Path(peer.local_path).expanduser() if peer.local_path else directory / "checkpoint",
            model,
            tokenizer,
            swarm.optimizer,
            run_id=peer.run_id,
            every_epochs=peer.save_checkpoint_epoch_interval,
            keep=peer.keep_checkpoints,
        )
        if store.last_epoch > 0:
            progress.say(f"{store.path} holds the state of epoch {store.last_epoch}")
        notice = CheckpointNotice(store, swarm.dht, peer.run_id, swarm.public_key, stop=stop)
        if evaluate is not None or judge_pairs is not None:
            evaluator = Evaluator(
                store, evaluate, judge_pairs, margin=peer.eval_margin, journal=journal, progress=progress, stop=stop
            )
        if peer.repo_url:
            uploader = make_uploader(peer, store, metrics=journal.path, progress=progress, stop=stop)
    end = RunEnd(
        peer.run_id,
        training.total_steps,
        store=store,
        evaluator=evaluator,
        uploader=uploader,
        reporter=reporter,
        progress=progress,
        stop=stop,
    )
    manifest = begin_to_hand_over(node, entry, peer=peer, trainer=False, say=progress.say)
    record_start(journal, node.settings, role="auxiliary peer")
    threads = [thread for thread in (reporter, assistant, notice, evaluator, uploader) if thread is not None]
    return AuxiliaryProgram(swarm, journal, store, threads, end, manifest)


def require_token(repo_id: str, *, say: Callable[[str], None]) -> None:
    """Raises ValueError if this machine's token may not write there, as far as the hub tells; says if it cannot."""
    give_up_on_silence(ASK_SECONDS)
    try:
        check_token(HfApi(), repo_id)
    except ConnectionError as error:
        say(
            f"the hub cannot be asked now whether {repo_id} may be uploaded to ({error}); the first upload will show it"
        )
    except ValueError as error:
        raise ValueError(f"--repo_url {repo_id}: {error}") from error
    give_up_on_silence()


def make_uploader(peer: AuxiliaryPeerArguments, store: CheckpointStore, *, metrics: Path, progress, stop) -> Uploader:
    prepare = partial(make_public, store=store, name=peer.repo_url, metrics=metrics)
    return Uploader(store, peer.repo_url, HfApi(), prepare=prepare, interval=peer.upload_interval, progress=progress,
                    stop=stop)  # fmt: skip
