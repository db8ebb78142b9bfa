"""``python -m src.preflight plan @FILE``: what a run would cost, before it exists.

    python -m src.preflight plan @demo/trainer.args --peers 20 --samples_per_second 40 --bandwidth 50

Takes the flags of run_trainer.py, and says what a run with them takes: its schedule in hours, bytes for each epoch,
memory, and what should be changed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from arguments import (
    ArgumentParser,
    CollaborationArguments,
    HFTrainerArguments,
    TrainerPeerArguments,
    check_positive,
    option,
    run_settings,
)
from src.console import quiet_libraries

PROGRAM = "python -m src.preflight plan"


@dataclass
class PlanArguments:
    """The swarm that is thought of."""

    peers: int = option(1, "Trainers of the run; each is taken to be equally fast.", topic="")
    samples_per_second: float | None = option(
        None, "Samples of full length (--max_sequence_length) that one trainer computes in a second.", topic=""
    )
    json: str | None = option(None, "Write the plan to this file, too.", topic="")

    def __post_init__(self):
        check_positive(self, "peers", *(["samples_per_second"] if self.samples_per_second is not None else []))


def read_config(path: Path, activation_memory: str | None):
    """Raises ValueError if the file is no model configuration."""
    from src.models.config import LeanAlbertConfig

    try:
        config = LeanAlbertConfig.from_dict(json.loads(path.expanduser().read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"--model_config_path: {path}: {getattr(error, 'strerror', None) or error}") from error
    config.sparse_prediction = True  # as in the trainer
    config.activation_memory = activation_memory or config.activation_memory
    return config


def plan(words: Sequence[str]) -> None:
    """Prints the plan. Raises ValueError and OSError."""
    parser = ArgumentParser(
        TrainerPeerArguments, CollaborationArguments, HFTrainerArguments, PlanArguments,
        prog=PROGRAM, description=__doc__.partition("\n\n")[2],
    )  # fmt: skip
    # the name of a run is its operator's choice, so recipes have none, and nothing depends on it
    peer, collaboration, training, swarm = parser.parse(["--run_id", "planned", *words])
    if peer.model_config_path is None:
        raise ValueError("which model? Name a recipe (@recipes/small/trainer.args) or pass --model_config_path")
    quiet_libraries()
    from src.files import write_atomically
    from src.preflight.machine import Workload, needed_memory
    from src.preflight.plan import Circumstances, Pace, make_plan

    config = read_config(Path(peer.model_config_path), training.activation_memory)
    pace, speed = None, swarm.samples_per_second
    if speed is not None:
        step = training.per_device_train_batch_size * training.gradient_accumulation_steps
        pace = Pace(speed, step / speed, length=training.max_sequence_length)
    made = make_plan(
        config,
        run_settings(peer, collaboration, training),
        Circumstances(num_trainers=swarm.peers, pace=pace, bandwidth=peer.bandwidth),
        needed_memory(
            config,
            Workload.of(training, local_steps=bool(collaboration.local_batch_size)),
            on_gpu=training.device.type == "cuda",
        ),
    )
    print("\n".join([*made.lines(), *(warning.lines() for warning in made.warnings)]))
    if swarm.json is not None:
        content = json.dumps(asdict(made), indent=2, ensure_ascii=False) + "\n"
        write_atomically(Path(swarm.json).expanduser(), content.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] != ["plan"]:
        print(f"usage: {PROGRAM} @FILE [flags]; {PROGRAM} --help lists them", file=sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    try:
        plan(words[1:])
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
