"""A whole swarm on this machine: one auxiliary peer and two trainers learn Russian together for a few minutes.

Ends with the figures of the run, a learning curve, and what the resulting model fills in. `make demo` runs this.
"""

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

WARMUP_SHARE = 0.15  # of the epochs, as in demo/swarm.args
STOPPED_WHILE_STARTING = 128 + signal.SIGTERM
EXAMPLES = ["Утром мы пошли в [MASK].", "Она поставила чашку на [MASK].", "В городе построили новый [MASK]."]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    from command_line import ArgumentParser

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, help="default: outputs/demo-DATE-TIME")
    parser.add_argument("--total_steps", type=int, help="epochs to train (default: as in demo/swarm.args)")
    parser.add_argument("--minutes", type=float, default=4.3, help="stop earlier if the machine is slow (default: 4.3)")
    options = parser.parse_args(argv)
    if options.total_steps is not None and options.total_steps < 1:
        parser.error(f"--total_steps {options.total_steps}: train for one epoch at least")
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes}: must be more than none")
    return options


def run_arguments(options: argparse.Namespace, directory: Path) -> list[str]:
    """What all peers of this swarm are told beside demo/swarm.args."""
    shared = ["--output_dir", str(directory)]
    if options.total_steps is not None:
        warmup = round(WARMUP_SHARE * options.total_steps)  # that of demo/swarm.args may be longer than the whole run
        shared += ["--total_steps", str(options.total_steps), "--warmup_steps", str(warmup)]
    return shared


def main() -> int:
    options = parse_arguments()
    from src.process.local_swarm import LocalSwarm

    directory = options.output_dir or REPOSITORY / "outputs" / time.strftime("demo-%Y%m%d-%H%M%S")
    shared = run_arguments(options, directory)
    print(f"Two trainers and an auxiliary peer start on this machine; their files go to {directory}\n", flush=True)
    started = time.monotonic()
    with LocalSwarm(environment={"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}) as swarm:
        held_out = ["--eval_sources", str(REPOSITORY / "demo" / "heldout.txt"), "--eval_batches", "2"]
        auxiliary = swarm.start("aux", "run_aux_peer.py", ["@demo/aux.args", *held_out, *shared])
        trainer_arguments = ["@demo/trainer.args", *shared, "--wait_for_peers", "2"]
        trainers = [swarm.start(f"trainer {number}", "run_trainer.py", trainer_arguments) for number in (1, 2)]
        codes, in_time = wait_or_stop(trainers, deadline=started + 60 * options.minutes)
        if in_time and not any(codes):
            auxiliary.wait_for_line("evaluate it with", timeout=60)
    if any(codes) and (in_time or set(codes) - {0, STOPPED_WHILE_STARTING}):
        print(f"a trainer ended with code {max(codes)}; its output stands above", file=sys.stderr)
        return 1
    run = directory / "demo"
    if missing := what_is_missing(run):
        print(f"\n{options.minutes:g} minutes were too short (--minutes): {missing}", file=sys.stderr)
        return 1
    report(run, seconds=time.monotonic() - started)
    model, epoch = newest_model(run)
    fill_masks(model, epoch)
    print(NEXT_STEPS.format(model=model))
    return 0


def wait_or_stop(trainers: list, *, deadline: float) -> tuple[list[int], bool]:
    """Exit codes of the trainers, and whether they ended by themselves: they are asked to when time is up."""
    while any(trainer.process.poll() is None for trainer in trainers):
        if time.monotonic() > deadline:
            print("\ntime is up: the trainers leave before their last epoch\n", flush=True)
            for trainer in trainers:
                trainer.process.terminate()
            return [trainer.process.wait() for trainer in trainers], False
        time.sleep(0.2)
    return [trainer.process.returncode for trainer in trainers], True


def what_is_missing(run: Path) -> str:
    """Why there is nothing to show of a run that was stopped early; nothing if all is there."""
    from src.trainer.run_summary import summarise_run

    backups = [run / name / "backup.pth" for name in ("trainer", "trainer-2")]
    try:
        summarise_run(run / "trainer" / "metrics.jsonl")
    except (OSError, ValueError):
        return "no epoch was finished"
    if not all(backup.exists() for backup in backups):
        return "one of the trainers did not get to its first epoch"
    return ""


def report(run: Path, *, seconds: float) -> None:
    """Print what the run's metrics files say, and draw the learning curve beside them."""
    from src.trainer.run_summary import compare_parameters, draw_learning_curve, summarise_run

    summary = summarise_run(run / "trainer" / "metrics.jsonl")
    difference = compare_parameters(run / "trainer" / "backup.pth", run / "trainer-2" / "backup.pth")
    curve = draw_learning_curve(run / "trainer" / "metrics.jsonl", run / "learning_curve.png")
    print(f"""
{summary.epochs} epochs in {seconds:.0f} s, start-up included
masked-token loss: {summary.first_loss:.3f} at first, {summary.last_loss:.3f} at the end
{summary.rounds_with_partner} of {summary.rounds} rounds averaged gradients of both trainers, {summary.partial} partial
parameters of the two trainers differ by {difference.relative:.1e} (relative), {difference.largest:.1e} at most
learning curve: {curve}
report of the run, for a browser: {run / "aux" / "report.html"}""")


def newest_model(run: Path) -> tuple[Path, int]:
    """A directory that `from_pretrained` opens, and its epoch: what the auxiliary peer has stored.

    When time was up before the last epoch, a trainer has a newer one in its backup, which is exported.
    """
    from src.auxiliary.checkpoints import stored_epoch
    from src.export.export import main as export
    from src.trainer.backup import read_backup

    checkpoint, backup = run / "aux" / "checkpoint", run / "trainer" / "backup.pth"
    stored, epoch = stored_epoch(checkpoint, "demo"), read_backup(backup)["epoch"]
    if stored >= epoch:
        return checkpoint, stored
    print()
    demo = REPOSITORY / "demo"
    export([str(backup), str(run / "model"), "--model-config", str(demo / "config.json"),
            "--tokenizer", str(demo / "tokenizer")])  # fmt: skip
    return run / "model", epoch


def fill_masks(checkpoint: Path, epoch: int) -> None:
    """Let a model complete three sentences."""
    from transformers import pipeline

    from src import LeanAlbertForMaskedLM, load_tokenizer
    from src.console import quiet_libraries

    quiet_libraries()
    fill = pipeline(
        "fill-mask", model=LeanAlbertForMaskedLM.from_pretrained(checkpoint), tokenizer=load_tokenizer(checkpoint)
    )
    print(f"\nWhat the model of epoch {epoch} fills in (a few minutes teach it little more than what is frequent):")
    for example in EXAMPLES:
        words = ", ".join(f"«{answer['token_str']}» {answer['score']:.0%}" for answer in fill(example, top_k=3))
        print(f"  {example}  {words}")


NEXT_STEPS = """
Next:
  python run_trainer.py                          your own swarm; it prints how others join
  python -m tasks.mlm.inspect_data               look at masked training batches
  {model}
                                                 opens with LeanAlbertForMaskedLM.from_pretrained
"""

if __name__ == "__main__":
    sys.exit(main())
