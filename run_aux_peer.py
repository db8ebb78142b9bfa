"""Keep a run together from a machine without a GPU: report metrics, help to average, store and upload checkpoints."""

import sys
from pathlib import Path

from src.process.memory import limit_memory
from src.process.sockets import make_socket_directory
from src.process.supervisor import install_stop_handler, leave_at_once, run_supervised

STOP_SECONDS, KILL_SECONDS = 25.0, 28.0  # to leave the swarm in order after a stop; until the supervisor kills
FINISH_SECONDS = 15.0  # of them, for what is under way; the rest is for leaving


def main() -> int:
    limit_memory()
    # Heavy imports come here, not above: the supervising parent process should stay small.
    import threading

    from arguments import ArgumentParser, AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments
    from src.auxiliary.monitor import Watch
    from src.metrics import console
    from src.metrics.history import read_history
    from src.metrics.terminal import TerminalView
    from src.process.watchdog import Watchdog, may_start_again
    from src.swarm.clock import ClockWatch
    from src.swarm.dht import visible_addresses
    from src.swarm.reconnect import KeepInTouch

    console.quiet_libraries()
    parser = ArgumentParser(AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments, description=__doc__)
    alone = not set(sys.argv[1:]) - {"--check"}  # without a word on the run: the demo's
    peer, collaboration, training = parser.parse([*(["@demo/aux.args"] if alone else []), *sys.argv[1:]])
    progress, stop = TerminalView() if sys.stdout.isatty() else console.Progress(), threading.Event()
    if peer.check:
        leave_at_once(check(peer, collaboration, training, progress))
    peer.restart = may_start_again(peer.restart)
    try:
        with Watchdog(say=progress.say, stop=stop, start_again=peer.restart, asks=False):
            swarm, journal, store, threads, end = build(peer, collaboration, training, progress=progress, stop=stop)
    except (ValueError, OSError) as error:
        print(f"run_aux_peer.py: error: {error}", file=sys.stderr)
        leave_at_once(2)
    # now, because hivemind has replaced the handlers
    install_stop_handler(stop.set, swarm.optimizer.stop_waiting, deadline_seconds=STOP_SECONDS)
    addresses = visible_addresses(swarm.dht)
    progress.say(f"run {peer.run_id}: this auxiliary peer listens on {', '.join(addresses)}")
    progress.say(f"trainers and further auxiliary peers join with\n  --initial_peers {' '.join(addresses)}")
    ClockWatch(swarm.dht, say=progress.say, stop=stop).start()
    if not peer.use_ipfs:
        KeepInTouch(swarm.dht, peer.initial_peers, stop=stop).start()
    for thread in threads:
        thread.start()
    if isinstance(progress, TerminalView):
        history = journal.follow(read_history)  # with an earlier part of the run, if this peer was started anew
        progress.start(history, swarm.optimizer.tracker)
    total_steps = training.total_steps
    watch = Watch(
        swarm, peer.run_id, total_steps=total_steps, journal=journal, store=store, progress=progress, stop=stop
    )
    with Watchdog(say=progress.say, stop=stop, start_again=peer.restart):
        watch.run(period=peer.refresh_period, when_over=end.complete)
        progress.close()
        progress.say("leaving the swarm")
        end.wait_for(threads, seconds=FINISH_SECONDS)
    swarm.leave()
    journal.close()
    leave_at_once(0)  # at an ordinary exit hivemind's futures complain that their event loop is closed


def check(peer, collaboration, training, progress) -> int:
    """Test this machine's set-up without joining the run; returns the exit code."""
    from functools import partial

    import torch
    from huggingface_hub import HfApi

    from arguments import run_settings
    from src.preflight.preflight import Workload, check_uploads, run_checks
    from src.swarm.run_card import make_run_card
    from tasks.mlm.evaluate import checkpoint_scorer
    from tasks.mlm.task import build_model

    return run_checks(
        peer,
        output_dir=training.output_dir,
        device=torch.device("cpu"),
        workload=Workload(training.min_8bit_size),
        build_model=lambda: build_model(peer, seed=training.seed),
        make_card=partial(make_run_card, settings=run_settings(peer, collaboration, training), trainer=False),
        read_data=(lambda tokenizer: checkpoint_scorer(tokenizer, peer.eval_sources, num_batches=1))
        if peer.eval_sources
        else None,
        check_uploads=partial(check_uploads, HfApi(), peer.repo_url) if peer.repo_url else None,
        say=progress.say,
    )


def build(peer, collaboration, training, *, progress, stop):
    """All that an auxiliary peer consists of. hivemind forks its processes, so it comes before threads are started."""

    from functools import partial

    from huggingface_hub import HfApi

    from arguments import run_settings
    from src.auxiliary.auxiliary import (
        AveragingAssistant,
        CheckpointNotice,
        CheckpointStore,
        Evaluator,
        Uploader,
        make_public,
    )
    from src.auxiliary.run_end import RunEnd
    from src.metrics.journal import claim_run_directory
    from src.metrics.report import Reporter
    from src.models.hub import ASK_SECONDS, check_token, give_up_on_silence
    from src.process.same_peer import keep_ports, take_up_identity
    from src.swarm.join import join_run, record_start, start_averaging
    from tasks.mlm.evaluate import checkpoint_scorer
    from tasks.mlm.task import build_model

    model, tokenizer = build_model(peer, seed=training.seed)
    if peer.repo_url:
        give_up_on_silence(ASK_SECONDS)
        try:
            check_token(HfApi(), peer.repo_url)
        except ConnectionError as error:
            progress.say(f"the hub cannot be asked now whether {peer.repo_url} may be uploaded to ({error}); the first "
                         "upload will show it")  # fmt: skip
        except ValueError as error:
            raise ValueError(f"--repo_url {peer.repo_url}: {error}") from error
        give_up_on_silence()
    directory = claim_run_directory(training.output_dir, peer.run_id, "aux")
    settings = run_settings(peer, collaboration, training)
    if peer.restart:
        take_up_identity(peer)
    node = join_run(model, tokenizer, settings, peer=peer, trainer=False, say=progress.say)
    if peer.restart:
        keep_ports(peer, node.dht)
    evaluate = (
        checkpoint_scorer(tokenizer, peer.eval_sources, num_batches=peer.eval_batches) if peer.eval_sources else None
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
        )
        if store.last_epoch > 0:
            progress.say(f"{store.path} holds the state of epoch {store.last_epoch}")
        notice = CheckpointNotice(store, swarm.dht, peer.run_id, swarm.public_key, stop=stop)
        if evaluate is not None:
            evaluator = Evaluator(store, evaluate, journal=journal, progress=progress, stop=stop)
        if peer.repo_url:
            uploader = Uploader(
                store,
                peer.repo_url,
                HfApi(),
                prepare=partial(make_public, store=store, name=peer.repo_url, metrics=journal.path),
                interval=peer.upload_interval,
                progress=progress,
                stop=stop,
            )
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
    record_start(journal, node.settings, role="auxiliary peer")
    threads = [thread for thread in (reporter, assistant, notice, evaluator, uploader) if thread is not None]
    return swarm, journal, store, threads, end


if __name__ == "__main__":
    sys.exit(run_supervised(main, grace_seconds=KILL_SECONDS, scratch=make_socket_directory()))
