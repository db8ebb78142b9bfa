"""Train a masked language model together with the other peers of a run.

Without arguments this starts a one-peer swarm on the bundled demo model and text (the same as `@demo/trainer.args`).
"""

import os
import sys

from src.process.memory import limit_memory
from src.process.sockets import make_socket_directory
from src.process.supervisor import leave_at_once, run_supervised

KILL_SECONDS = 28.0  # after a stop, until the supervisor kills


def main() -> int:  # noqa: PLR0915 (imports count; read once, in order)
    limit_memory()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read once, when torch is loaded
    # Heavy imports come here, not above: the supervising parent process should stay small.
    import threading

    from arguments import ArgumentParser, CollaborationArguments, HFTrainerArguments, TrainerPeerArguments

    parser = ArgumentParser(TrainerPeerArguments, CollaborationArguments, HFTrainerArguments, description=__doc__)
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser.parse(sys.argv[1:])  # prints and exits: no need to load hivemind for it
    from src.console import quiet_libraries

    quiet_libraries()  # before they are loaded
    from src.metrics.console import Progress
    from src.preflight.run import settings_for_check
    from src.process.watchdog import Watchdog, may_start_again
    from src.swarm.at_work import go_to_work
    from src.swarm.dht import short_peer_name
    from src.swarm.join import enter
    from src.trainer.build import build, check, follow, train
    from src.trainer.local_workers import share_settings
    from tasks.mlm import task
    from tasks.mlm.text_errors import TextError

    alone = not set(sys.argv[1:]) - {"--check"}
    argv = ["@demo/trainer.args", *sys.argv[1:]] if alone else sys.argv[1:]
    words = parser.read_files(argv)
    peer, given = parser.parse_first(words)
    progress, stop = Progress(), threading.Event()
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun has started several processes of this script
        leave_at_once(follow(parser, words, task=task, text_error=TextError, stop=stop))
    if alone:
        progress.say("no arguments: the bundled demo model on the bundled text (@demo/trainer.args)")
    if peer.check:
        with settings_for_check(peer, given, reads_text=True, say=progress.say) as entry:
            code = 2 if entry is None else check(*parser.parse_run([*entry.words, *words]), task=task, say=progress.say)
        leave_at_once(code)
    may_restart = may_start_again(peer.restart)
    try:
        with Watchdog(say=progress.say, stop=stop, start_again=may_restart, asks=False):
            entry = enter(peer, given, reads_text=True, say=progress.say)
            share_settings(entry.settings_hash)
            peer, collaboration, training = parser.parse_run([*entry.words, *words])
            peer.restart = may_restart
            program = build(peer, collaboration, training, entry=entry, task=task, progress=progress, stop=stop)
    except (ValueError, OSError) as error:
        print(f"run_trainer.py: error: {error}", file=sys.stderr)
        leave_at_once(2)
    except SystemExit as end:  # of the parser, perhaps beside a node
        leave_at_once(end.code)
    swarm, callback = program.swarm, program.callback

    def introduce(addresses: list[str], joining: str) -> list[str]:
        what = "joining" if peer.initial_peers else "started"
        return [f"{what} run {peer.run_id}; others join with\n  {joining}",
                f"reports call this trainer {short_peer_name(swarm.public_key)}"]  # fmt: skip

    go_to_work(swarm, peer, manifest=program.manifest, total_epochs=training.total_steps, introduce=introduce,
               progress=progress, stop=stop)  # fmt: skip
    program.outlook.begin()
    with Watchdog(say=progress.say, stop=stop, start_again=peer.restart, save=callback.save_last,
                  is_late=callback.is_late, leave=swarm.leave):  # fmt: skip
        code = train(program.trainer, text_error=TextError, say=progress.say)
    epoch = swarm.optimizer.local_epoch
    how = "trained to the last epoch," if epoch >= training.total_steps else "stopped at epoch"
    progress.say(f"{how} {epoch}, leaving the swarm")
    swarm.leave()
    program.journal.close()
    leave_at_once(code)  # at an ordinary exit hivemind's futures complain that their event loop is closed


if __name__ == "__main__":
    sys.exit(run_supervised(main, grace_seconds=KILL_SECONDS, scratch=make_socket_directory()))
