"""Keep a run together from a machine without a GPU: report metrics, help to average, store and upload checkpoints."""

import sys

from src.process.memory import limit_memory
from src.process.sockets import make_socket_directory
from src.process.supervisor import leave_at_once, run_supervised

KILL_SECONDS = 28.0  # after a stop, until the supervisor kills
FINISH_SECONDS = 15.0  # of them, for what is under way; the rest is for leaving the swarm


def main() -> int:  # noqa: PLR0915 (imports count; read once, in order)
    limit_memory()
    # Heavy imports come here, not above: the supervising parent process should stay small.
    import threading

    from arguments import ArgumentParser, AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments
    from src.console import quiet_libraries

    quiet_libraries()  # before they are loaded
    from src.auxiliary.build import MakeScorers, build, check
    from src.auxiliary.monitor import Watch
    from src.metrics.console import Progress
    from src.metrics.history import read_history
    from src.metrics.terminal import TerminalView
    from src.preflight.run import settings_for_check
    from src.process.watchdog import Watchdog, may_start_again
    from src.swarm.at_work import go_to_work
    from src.swarm.join import enter
    from tasks.mlm import task
    from tasks.mlm.evaluate import checkpoint_scorer
    from tasks.rublimp.checkpoints import pair_scorer

    parser = ArgumentParser(AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments, description=__doc__)
    make_scorers = MakeScorers(held_out=checkpoint_scorer, pairs=pair_scorer)
    alone = not set(sys.argv[1:]) - {"--check"}  # without a word on the run: the demo's
    words = parser.read_files([*(["@demo/aux.args"] if alone else []), *sys.argv[1:]])
    peer, given = parser.parse_first(words)
    progress, stop = TerminalView() if sys.stdout.isatty() else Progress(), threading.Event()
    if peer.check:
        with settings_for_check(peer, given, reads_text=False, say=progress.say) as entry:
            code = 2
            if entry is not None:
                parsed = parser.parse_run([*entry.words, *words])
                code = check(*parsed, task=task, make_scorers=make_scorers, say=progress.say)
        leave_at_once(code)
    may_restart = may_start_again(peer.restart)
    try:
        with Watchdog(say=progress.say, stop=stop, start_again=may_restart, asks=False):
            entry = enter(peer, given, reads_text=False, say=progress.say)
            peer, collaboration, training = parser.parse_run([*entry.words, *words])
            peer.restart = may_restart
            program = build(peer, collaboration, training, entry=entry, task=task, make_scorers=make_scorers,
                            progress=progress, stop=stop)  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"run_aux_peer.py: error: {error}", file=sys.stderr)
        leave_at_once(2)
    except SystemExit as end:  # of the parser, perhaps beside a node
        leave_at_once(end.code)
    swarm, journal, total_steps = program.swarm, program.journal, training.total_steps

    def introduce(addresses: list[str], joining: str) -> list[str]:
        return [f"run {peer.run_id}: this auxiliary peer listens on {', '.join(addresses)}",
                f"trainers join with\n  {joining}"]  # fmt: skip

    go_to_work(swarm, peer, manifest=program.manifest, total_epochs=total_steps, introduce=introduce,
               progress=progress, stop=stop)  # fmt: skip
    for thread in program.threads:
        thread.start()
    if isinstance(progress, TerminalView):
        history = journal.follow(read_history)  # with an earlier part of the run, if this peer was started anew
        progress.start(history, swarm.optimizer.tracker)
    watch = Watch(swarm, peer.run_id, total_steps=total_steps, journal=journal, store=program.store, progress=progress,
                  stop=stop)  # fmt: skip
    with Watchdog(say=progress.say, stop=stop, start_again=peer.restart):
        watch.run(period=peer.refresh_period, when_over=program.end.complete)
        progress.close()
        progress.say("leaving the swarm")
        program.end.wait_for(program.threads, seconds=FINISH_SECONDS)
    swarm.leave()
    journal.close()
    leave_at_once(0)  # at an ordinary exit hivemind's futures complain that their event loop is closed


if __name__ == "__main__":
    sys.exit(run_supervised(main, grace_seconds=KILL_SECONDS, scratch=make_socket_directory()))
