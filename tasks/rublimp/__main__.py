"""RuBLiMP (arXiv 2406.19232): which of two sentences is grammatical? Asked of a masked model, without fine-tuning.

    python -m tasks.rublimp -c outputs/RUN_ID/aux/checkpoint -d DATA
    python -m tasks.rublimp -m ruroberta-large -d DATA --pairs 1000
    python -m tasks.rublimp -m trigram --text 'corpus/*.txt' --tokenizer TOKENIZER -d DATA   # what a model must beat

Results go to OUTPUT_DIR/MODEL/RuBLiMP/KEY and to the ledger, OUTPUT_DIR/runs.jsonl. Whatever is scored is kept: run the
same command again after an interruption.
"""

import argparse
import sys
from pathlib import Path

from command_line import ArgumentParser, refuse_files
from src.console import quiet_libraries
from tasks.finetuning.console import InputError, fail

PROGRAM = "python -m tasks.rublimp"
BASELINES = ("unigram", "trigram")
DEMO_TOKENIZER = Path(__file__).resolve().parents[2] / "demo" / "tokenizer"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=PROGRAM, description=__doc__, usage="%(prog)s (-c CHECKPOINT | -m MODEL|unigram|trigram) -d DATA [flags]"
    )
    what = parser.add_argument_group("which model")
    which = what.add_mutually_exclusive_group(required=True)
    which.add_argument("-c", "--checkpoint", help="state.pth, a trainer's backup.pth, or a directory that "
                       "from_pretrained opens")  # fmt: skip
    which.add_argument("-m", "--model-name", help="ruroberta-large, any masked model of the Hugging Face hub or a "
                       "directory; unigram or trigram: a model of that kind of --text")  # fmt: skip
    what.add_argument(
        "--model-config", help="configuration of state.pth or backup.pth (default: config.json beside it)"
    )
    what.add_argument("--tokenizer", help="directory or hub id (default: the one that lies with the model; of unigram "
                      "and trigram the demo's)")  # fmt: skip
    what.add_argument("--text", nargs="+", metavar="SOURCE", help="what unigram and trigram count, written as "
                      "--dataset_sources: files, globs or name[:config] of the hub (held in memory)")  # fmt: skip
    how = parser.add_argument_group("on which pairs, and how")
    how.add_argument("-d", "--data-dir", type=Path, default=Path(), help="holds RuBLiMP/PARADIGM.csv; without that "
                     "folder they are read from the hub (default: .)")  # fmt: skip
    how.add_argument("--pairs", type=int, default=200, help="of each paradigm, always the same ones; 1000 is all of "
                     "them (default: 200)")  # fmt: skip
    how.add_argument("--form", choices=("mean", "sum", "word"), default="mean", help="of a sentence's log-probability: "
                     "the mean over its tokens (the benchmark's), their sum, or the sum where the rest of a token's "
                     "word is masked, too (arXiv 2305.10588) (default: mean)")  # fmt: skip
    how.add_argument("--tokens-at-once", type=int, default=2048, help="in one forward pass; changes no result "
                     "(default: 2048)")  # fmt: skip
    where = parser.add_argument_group("where results go")
    where.add_argument("--output-dir", type=Path, default=Path("runs"), help="ledger, runs (default: runs)")
    options = parser.parse_args(argv)
    for name in ("pairs", "tokens_at_once"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    is_baseline = options.model_name in BASELINES
    if is_baseline and not options.text:
        parser.error(f"-m {options.model_name} needs --text: the text whose tokens it counts")
    if options.text and not is_baseline:
        parser.error("--text is for -m unigram and -m trigram")
    if is_baseline and options.form == "word":
        parser.error(f"-m {options.model_name} masks nothing; take --form mean or sum")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    # Heavy imports come after the command line has been understood, so that --help is quick.
    from tasks.finetuning.ledger import LEDGER, Ledger
    from tasks.rublimp.pairs import read_pairs

    quiet_libraries("tasks")
    try:
        refuse_files(output_dir=options.output_dir)
        ledger = Ledger(options.output_dir / LEDGER)
        ledger.rows()  # a damaged line is an error now, not at the end
        pairs = read_pairs(options.data_dir, pairs_each=options.pairs)
        experiment = (prepare_baseline if options.text else prepare_model)(options, pairs, ledger)
        experiment.run()
        return 0
    except (InputError, ValueError, MemoryError, OSError) as error:
        return fail(PROGRAM, error)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last pair that was scored", file=sys.stderr)
        return 130


def prepare_baseline(options: argparse.Namespace, pairs: list, ledger):
    from src.models import load_tokenizer
    from tasks.rublimp.experiment import Experiment
    from tasks.rublimp.ngrams import ORDERS, NGramModel

    if not options.tokenizer:
        print(f"{options.model_name} of the demo's tokens (--tokenizer)")
    model = NGramModel(load_tokenizer(options.tokenizer or DEMO_TOKENIZER), ORDERS[options.model_name])
    model.fit(options.text)
    return Experiment(
        model=options.model_name,
        source=" ".join(options.text),
        model_fingerprint=model.fingerprint(),
        pairs=pairs,
        form=options.form,
        ledger=ledger,
        score=model,
        pairs_each=options.pairs,
    )


def prepare_model(options: argparse.Namespace, pairs: list, ledger):
    import torch

    from tasks.finetuning.backbone import find_pretrained
    from tasks.rublimp.experiment import Experiment
    from tasks.rublimp.pseudo_likelihood import PseudoLikelihood, check_tokenizer, divide_by_length, longest_input

    pretrained = find_pretrained(
        options.model_name, options.checkpoint, model_config=options.model_config, tokenizer=options.tokenizer
    )
    check_tokenizer(pretrained.tokenizer, by_word=options.form == "word")
    for note in pretrained.notes:
        print(note)
    model = pretrained.load_masked_model().to("cuda" if torch.cuda.is_available() else "cpu")
    score = PseudoLikelihood(
        model, pretrained.tokenizer, by_word=options.form == "word", tokens_at_once=options.tokens_at_once
    )
    pairs, too_long = divide_by_length(pairs, pretrained.tokenizer, longest_input(model, pretrained.tokenizer))
    if not pairs:
        raise ValueError(f"{pretrained.source}: reads {longest_input(model, pretrained.tokenizer)} tokens, fewer than "
                         "any pair has")  # fmt: skip
    return Experiment(
        model=pretrained.name,
        source=pretrained.source,
        model_fingerprint=pretrained.fingerprint,
        pairs=pairs,
        form=options.form,
        ledger=ledger,
        score=score,
        pairs_each=options.pairs,
        left_out=too_long,
    )


if __name__ == "__main__":
    sys.exit(main())
