"""Answer LiDiRus with a model fine-tuned on TERRa: MCC, its table by linguistic tag, and the submission.

python predict_on_lidirus.py                            # the newest TERRa run in runs/runs.jsonl
python predict_on_lidirus.py -m ruroberta-large -d DATA
python predict_on_lidirus.py -m runs/MODEL/TERRa/KEY/seed-0
"""

import argparse
import sys
from pathlib import Path

from command_line import ArgumentParser, refuse_files
from src.console import quiet_libraries
from tasks.finetuning.console import InputError, fail

PROGRAM = "predict_on_lidirus.py"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__)
    what = parser.add_argument_group("which model answers what")
    what.add_argument("-m", "--model-name", help="directory of a TERRa run, or a model as it was given to "
                      "finetune_mlm.py: its best seed by dev (default: of the newest TERRa run)")  # fmt: skip
    what.add_argument("-d", "--data-dir", type=Path, default=Path(), help="holds LiDiRus/LiDiRus.jsonl (default: .)")
    where = parser.add_argument_group("where results are")
    where.add_argument("--output-dir", type=Path, default=Path("runs"), help="where the ledger is (default: runs)")
    where.add_argument(
        "--predictions-dir", type=Path, default=Path("preds"), help="where submissions go (default: preds)"
    )
    return parser.parse_args(argv)


def find_run(model_name: str | None, output_dir: Path) -> Path:
    """The directory of the run that -m means: that directory itself, or the best seed of the model's newest run."""
    from tasks.finetuning.experiment import RUN_FILE
    from tasks.finetuning.ledger import LEDGER, Ledger, best_row
    from tasks.registry import TASKS

    if model_name is not None and (Path(model_name) / RUN_FILE).is_file():
        return Path(model_name)
    ledger = Ledger(output_dir / LEDGER)
    rows = ledger.newest("TERRa", model_name)
    if not rows:
        known = sorted({row["model"] for row in ledger.rows() if row["task"] == "TERRa"})
        of_model = f" of {model_name}" if model_name else ""
        there_are = f"there are those of {', '.join(known)}" if known else "it has none"
        raise ValueError(
            f"no TERRa run{of_model} in {ledger.path} ({there_are}); pass -m RUN_DIRECTORY, or train one with "
            f"python finetune_mlm.py -t TERRa"
        )
    return output_dir / best_row(rows, TASKS["terra"].main_metric)["directory"]


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    from tasks import evaluation
    from tasks.finetuning.experiment import open_run
    from tasks.registry import TASKS

    quiet_libraries("tasks")
    lidirus, terra = TASKS["lidirus"], TASKS["terra"]
    try:
        refuse_files(output_dir=options.output_dir, predictions_dir=options.predictions_dir)
        records = lidirus.load(options.data_dir)["test"]
        directory = find_run(options.model_name, options.output_dir)
        run = open_run(directory, terra)
    except (ValueError, OSError) as error:
        return fail(PROGRAM, error)
    print(f"TERRa run: {directory}")
    try:
        path = evaluation.predict_with_run(lidirus, run, records, predictions_dir=options.predictions_dir)
        return 0 if evaluation.pack(path.parent, options.data_dir) else 1
    except (InputError, MemoryError, OSError) as error:
        return fail(PROGRAM, error)


if __name__ == "__main__":
    sys.exit(main())
