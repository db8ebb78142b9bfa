"""Fine-tune a pretrained model on Russian SuperGLUE and RuCoLA, score it, and write what the leaderboards accept.

    python finetune_mlm.py -t RuCoLA                        # ./state.pth, or the newest checkpoint under outputs/
    python finetune_mlm.py -t all -m ruroberta-large -d DATA --num-seeds 5
    python finetune_mlm.py -t RuCoLA -m tfidf               # the floor a model must beat

Finished seeds are in OUTPUT_DIR/runs.jsonl and never run twice; run the same command again after an interruption, or
with a larger --num-seeds. Predictions of the best seed by dev score go to preds/MODEL.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from command_line import ArgumentParser, refuse_files
from src.console import quiet_libraries
from tasks.finetuning.console import InputError, fail

PROGRAM = "finetune_mlm.py"
BASELINES = ("majority", "tfidf")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=PROGRAM, description=__doc__, usage="%(prog)s -t TASK [-c CHECKPOINT | -m MODEL] [-d DATA_DIR] [flags]"
    )
    what = parser.add_argument_group("what to fine-tune on what")
    what.add_argument("-t", "--task", required=True, help="RCB, TERRa, LiDiRus, DaNetQA, PARus, MuSeRC, RUSSE, "
                      "RWSD, RuCoS or RuCoLA in any case, or all with a folder in --data-dir (required)")  # fmt: skip
    what.add_argument("-m", "--model-name", help="ruroberta-large, any masked model of the Hugging Face hub or a "
                      "directory; tfidf or majority for a baseline (default: --checkpoint)")  # fmt: skip
    what.add_argument("-c", "--checkpoint", help="state.pth, a trainer's backup.pth, or a directory that "
                      "from_pretrained opens (default: state.pth here, or the newest one under outputs/)")  # fmt: skip
    what.add_argument(
        "--model-config", help="configuration of state.pth or backup.pth (default: config.json beside it)"
    )
    what.add_argument("--tokenizer", help="directory or hub id (default: the one that lies with the model)")
    what.add_argument("-d", "--data-dir", type=Path, default=Path(), help="holds TASK/train.jsonl ... or "
                      "RussianSuperGLUE/TASK/..., and RuCoLA/*.csv (default: .)")  # fmt: skip
    how = parser.add_argument_group("how to train")
    how.add_argument("--batch-size", type=int, default=32, help="rows on the device at once (default: 32)")
    how.add_argument("--grad-acc-steps", type=int, default=1, help="batches in one step (default: 1)")
    how.add_argument("--dropout", type=float, default=0.1, help="of the classifier (default: 0.1)")
    how.add_argument(
        "--weight-decay", type=float, default=0.01, help="of AdamW, not on biases and norms (default: 0.01)"
    )
    how.add_argument("--num-seeds", type=int, default=1, help="seeds 0, 1, ... that should be finished (default: 1)")
    how.add_argument("--num-epochs", type=int, default=40, help="passes over the training set (default: 40)")
    how.add_argument("--learning-rate", type=float, default=1e-5, help="peak of the schedule (default: 1e-5)")
    how.add_argument("--max-length", type=int, default=512, help="tokens of an input (default: 512)")
    how.add_argument("--early-stopping-patience", type=int, help="stop after so many epochs without a better "
                     "dev score (default: never)")  # fmt: skip
    how.add_argument("--max-steps", type=int, help="stop after so many steps (default: never)")
    how.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                     help="auto: bf16 or fp16 on a GPU that has it, else fp32 (default: auto)")  # fmt: skip
    where = parser.add_argument_group("where results go")
    where.add_argument("--output-dir", type=Path, default=Path("runs"), help="ledger, runs, tables (default: runs)")
    where.add_argument(
        "--predictions-dir", type=Path, default=Path("preds"), help="where submissions go (default: preds)"
    )
    where.add_argument("--report-to", choices=("none", "wandb", "tensorboard"), default="none",
                       help="where curves go besides (default: none)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    # Heavy imports come after the command line has been understood, so that --help is quick.
    from tasks import evaluation

    quiet_libraries("tasks")
    baseline = options.model_name.lower() if (options.model_name or "").lower() in BASELINES else None
    try:
        refuse_files(output_dir=options.output_dir, predictions_dir=options.predictions_dir)
        benchmarks = evaluation.prepare(options.task, options.data_dir)
        if baseline is None:
            pretrained, settings, ledger = prepare_training(options)
    except (ValueError, OSError) as error:
        return fail(PROGRAM, error)
    name = baseline or pretrained.name
    try:
        for benchmark in benchmarks:
            if baseline is not None:
                evaluation.evaluate_baseline(benchmark, baseline, predictions_dir=options.predictions_dir)
            else:
                evaluation.finetune(
                    benchmark,
                    pretrained,
                    settings,
                    num_seeds=options.num_seeds,
                    ledger=ledger,
                    predictions_dir=options.predictions_dir,
                    report_to=options.report_to,
                )
        return 0 if evaluation.pack(options.predictions_dir / name, options.data_dir) else 1
    except (InputError, MemoryError, OSError) as error:
        return fail(PROGRAM, error)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last finished epoch", file=sys.stderr)
        return 130


def prepare_training(options: argparse.Namespace):
    """(pretrained model, settings, ledger), all checked."""
    from tasks.evaluation import usable_length
    from tasks.finetuning.backbone import find_pretrained
    from tasks.finetuning.ledger import LEDGER, Ledger
    from tasks.finetuning.training import Settings, check_reporting, choose_precision

    if options.num_seeds < 1:
        raise ValueError(f"--num-seeds {options.num_seeds}: must be at least 1")
    check_reporting(options.report_to)
    precision = choose_precision(options.precision)
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "precision"]
    settings = Settings(**{name: getattr(options, name) for name in names}, precision=precision)
    ledger = Ledger(options.output_dir / LEDGER)
    ledger.rows()  # a damaged line is an error now, not after the training
    pretrained = find_pretrained(
        options.model_name, options.checkpoint, model_config=options.model_config, tokenizer=options.tokenizer
    )
    settings = usable_length(pretrained, settings)
    for note in pretrained.notes:
        print(note)
    return pretrained, settings, ledger


if __name__ == "__main__":
    sys.exit(main())
