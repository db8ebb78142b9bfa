"""Make a directory for the Hugging Face hub out of a checkpoint, and send it there if asked to.

    python -m src.export outputs/RUN_ID/aux/checkpoint my-model --metrics outputs/RUN_ID/*/metrics.jsonl
    python -m src.export state.pth my-model --push ORGANISATION/my-model --dry-run

The directory opens with transformers alone, in a program that has never heard of this repository:
AutoModelForMaskedLM.from_pretrained("my-model", trust_remote_code=True).
"""

import argparse
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging as transformers_logging

from src.export.model_card import (
    CURVE_FILE,
    draw_curve,
    held_out_curve,
    learning_curve,
    model_card,
    read_records,
    rows_of_model,
)
from src.files import replaced_directory, settle
from src.models import albert
from src.models.albert import LeanAlbertForMaskedLM, LeanAlbertForPreTraining
from src.models.checkpoint import check_size, give_usual_mode, load_strictly, read_state_dict
from src.models.companions import configs_in, places_of, read_config, tokenizers_in
from src.models.hub import explain_hub_error, give_up_on_silence
from src.models.tokenizer import OWN_CLASSES, PIPELINE_FILE, load_tokenizer

PROGRAM = "python -m src.export"
MODEL_FILE = Path(albert.__file__)
WORD_EMBEDDINGS = "albert.embeddings.word_embeddings.weight"
AUTO_MAP = {
    "AutoConfig": "config.LeanAlbertConfig",
    "AutoModel": "albert.LeanAlbertModel",
    "AutoModelForMaskedLM": "albert.LeanAlbertForMaskedLM",
    "AutoModelForPreTraining": "albert.LeanAlbertForPreTraining",
    "AutoModelForSequenceClassification": "albert.LeanAlbertForSequenceClassification",
}
# What the names of a tokenizer's files begin with.
TOKENIZER_FILES = ("tokenizer", "special_tokens", "spiece", "sentencepiece", "added_tokens", "vocab", "merges")
WHAT_TO_PASS = "pass state.pth, a trainer's backup.pth, or a directory that from_pretrained opens"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="state.pth, a trainer's backup.pth, or a directory that from_pretrained "
                        "opens, such as outputs/RUN_ID/aux/checkpoint")  # fmt: skip
    parser.add_argument("out", type=Path, help="the directory to make; an earlier export is replaced, nothing else is")
    what = parser.add_argument_group("what belongs to state.pth and backup.pth")
    what.add_argument("--model-config", type=Path, help="(default: config.json beside the weights or with the run's "
                      "auxiliary peer)")  # fmt: skip
    what.add_argument("--tokenizer", help="directory or hub id (default: looked for in the same places)")
    card = parser.add_argument_group("what the model card says")
    card.add_argument("--name", help="of the model (default: the repository of --push, else the directory's name)")
    card.add_argument("--license", help="a licence's id on the hub, such as apache-2.0 (default: not stated)")
    card.add_argument("--data", help="a sentence on the texts (default: the sources that --metrics names)")
    card.add_argument("--metrics", nargs="+", default=[], metavar="FILE", help="metrics.jsonl of the run's peers: "
                      "arguments, learning curve, held-out scores (default: none)")  # fmt: skip
    card.add_argument("--ledger", metavar="FILE", help="runs.jsonl of finetune_mlm.py: benchmarks (default: none)")
    card.add_argument("--ledger-model", metavar="MODEL", help="whose rows to take (default: those of the checkpoint)")
    hub = parser.add_argument_group("where it goes")
    hub.add_argument("--push", metavar="REPO", help="upload it as ORGANISATION/NAME (default: it stays here)")
    hub.add_argument("--dry-run", action="store_true", help="with --push: list what would be sent, send nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, *, api: HfApi | None = None) -> int:
    options = parse_arguments(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if options.push is not None:
            validate_repo_id(options.push)
        elif options.dry_run:
            raise ValueError("--dry-run lists what --push would send; pass --push ORGANISATION/NAME as well")
        export(options)
        print(f"{options.out} opens with AutoModelForMaskedLM.from_pretrained({str(options.out)!r}, "
              "trust_remote_code=True)")  # fmt: skip
        if options.push is not None:
            give_up_on_silence()
            push(options.out, options.push, api or HfApi(), dry_run=options.dry_run)
    except (ValueError, OSError, HfHubHTTPError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: stopped; {options.out} is as it was, or complete", file=sys.stderr)
        return 130
    return 0


def export(options: argparse.Namespace) -> None:
    """Make `options.out`: everything is read and checked, then written aside, then put in place."""
    check_target(options.out, options.checkpoint)
    metrics = [record for path in options.metrics for record in read_records(path)]
    curve, held_out = learning_curve(metrics), held_out_curve(metrics)
    if options.metrics and not metrics:
        raise ValueError(f"--metrics: there is no record in {' '.join(options.metrics)}")
    ledger = []
    if options.ledger is not None:
        ledger = rows_of_model(read_records(options.ledger), Path(options.checkpoint), options.ledger_model)
    model, tokenizer = open_checkpoint(options.checkpoint, options.model_config, options.tokenizer)
    card = model_card(
        name=options.name or options.push or options.out.resolve().name,
        model=model,
        tokenizer=tokenizer,
        license_name=options.license,
        data=options.data,
        metrics=metrics,
        ledger=ledger,
    )
    texts = {"README.md": card} | ({CURVE_FILE: draw_curve(curve, held_out)} if curve else {})
    write_export(options.out, model, tokenizer, texts)


def open_checkpoint(checkpoint: str, model_config: Path | None, tokenizer: str | None):
    """The model with the heads that the checkpoint has, in evaluation mode, and its tokenizer."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; {WHAT_TO_PASS}")
    state = read_state_dict(path)
    tokenizers, configs = tokenizers_in(places_of(path)), configs_in(places_of(path))
    if not (tokenizer or tokenizers):
        raise ValueError(f"{path}: no tokenizer with it; pass --tokenizer DIRECTORY (or a hub id)")
    if not (model_config or configs):
        raise ValueError(f"{path}: no config.json with it; pass --model-config FILE")
    loaded = load_tokenizer(tokenizer or tokenizers[0])
    config = read_config(model_config or configs[0])
    num_embeddings = next(iter(state[WORD_EMBEDDINGS].shape), 0) if WORD_EMBEDDINGS in state else 0
    if num_embeddings == len(loaded):  # the published model was resized to its tokenizer before it was trained
        config.vocab_size = num_embeddings
    if len(loaded) > config.vocab_size:
        raise ValueError(
            f"the tokenizer {loaded.name_or_path} has {len(loaded)} tokens, the model only {config.vocab_size}; they "
            "do not belong together (--tokenizer, --model-config)"
        )
    has_order_head = any(name.startswith("sop_classifier.") for name in state)
    if not has_order_head:  # nothing else uses the pooler
        state = {name: tensor for name, tensor in state.items() if not name.startswith("albert.pooler.")}
    kind = LeanAlbertForPreTraining if has_order_head else LeanAlbertForMaskedLM
    check_size(lambda: kind(config), state, source=path)
    model = kind(config)
    load_strictly(model, state, source=path)
    return model.eval(), loaded


def code_files() -> list[Path]:
    """The modules that the model classes need, as transformers' loader finds them: by following relative imports."""
    return sorted({MODEL_FILE, *map(Path, get_relative_import_files(MODEL_FILE))})


def check_target(out: Path, checkpoint: str) -> None:
    """Raises ValueError unless `out` is new, empty or an earlier export, recognised by its files and its auto_map."""
    settle(out)
    if out.resolve() == Path(checkpoint).expanduser().resolve():
        raise ValueError(f"{out} is the checkpoint itself; name another directory to make")
    if out.is_file():
        raise ValueError(f"{out} is a file; name a directory to make")
    if not out.is_dir() or not any(out.iterdir()):
        return
    config = out / "config.json"
    known = {path.name for path in code_files()} | {"config.json", "README.md", CURVE_FILE}
    foreign = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in known and not path.name.startswith(("model", *TOKENIZER_FILES))
    )
    if foreign or not config.is_file() or '"auto_map"' not in config.read_text(encoding="utf-8", errors="replace"):
        what = f"it holds {foreign[0]}" if foreign else "it is not an earlier export"
        raise ValueError(f"{out} is not empty and {what}; name a new directory, or empty this one yourself")


def write_export(out: Path, model, tokenizer, texts: dict[str, str]) -> None:
    """However this ends, `out` is as it was, or complete."""
    with replaced_directory(out) as folder:
        model.config.sparse_prediction = False  # a training option; users want logits everywhere
        model.save_pretrained(folder)
        complete(folder, tokenizer, texts)
        give_usual_mode(folder)


def complete(directory: Path, tokenizer, texts: dict[str, str]) -> None:
    """Give a directory with a model's weights and configuration what they need where nobody knows this repository.

    Its files are replaced, not written to: they may be other names of a checkpoint's.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for path in directory.iterdir():
        if path.name == "config.json" or path.name.startswith(TOKENIZER_FILES):
            path.unlink()
    config_text = json.dumps({**config, "auto_map": AUTO_MAP}, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    write_tokenizer(directory, tokenizer)
    for path in code_files():
        shutil.copyfile(path, directory / path.name)
    for name, text in {"config.json": config_text, **texts}.items():
        (directory / name).write_text(text, encoding="utf-8")


def write_tokenizer(directory: Path, tokenizer) -> None:
    """The tokenizer so that transformers' AutoTokenizer gives the ids and the segments that `load_tokenizer` gives."""
    tokenizer.save_pretrained(directory)
    source = Path(tokenizer.name_or_path) / PIPELINE_FILE
    if source.is_file() and Tokenizer.from_file(str(source)).to_str() == tokenizer.backend_tokenizer.to_str():
        shutil.copyfile(source, directory / PIPELINE_FILE)  # writing scores anew can change their last bit
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") in OWN_CLASSES:
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def push(directory: Path, repo_id: str, api, *, dry_run: bool) -> None:
    """Say what an upload sends and, unless it is only tried, send it."""
    files = sorted(directory.iterdir())
    total = sum(path.stat().st_size for path in files)
    print(f"{'would send' if dry_run else 'sending'} {len(files)} files, {format_size(total)}, to {repo_id}:")
    for path in files:
        print(f"  {format_size(path.stat().st_size):>9}  {path.name}")
    if dry_run:
        with suppress(Exception):  # a repository that does not exist yet, no network: a try needs neither
            print_what_stays(api, repo_id, files)
        print("nothing was sent; the same command without --dry-run sends it")
        return
    try:
        api.create_repo(repo_id, exist_ok=True)
        print_what_stays(api, repo_id, files)
        api.upload_folder(repo_id=repo_id, folder_path=str(directory), commit_message="Export of LeanALBERT")
    except Exception as error:  # whatever the network or the hub does: the directory is here and complete
        reason, advice = explain_hub_error(error)
        raise ValueError(
            f"--push {repo_id}: the upload failed ({reason}); {directory} is complete: {advice}, and run the command "
            "again"
        ) from error
    print(f"https://huggingface.co/{repo_id}")


def print_what_stays(api, repo_id: str, sent: list[Path]) -> None:
    if stays := what_stays(api, repo_id, sent):
        print(stays)


def what_stays(api, repo_id: str, sent: list[Path]) -> str:
    """What a repository holds already, in words; "" if nothing. An upload adds and replaces, it removes nothing: old
    weights or another tokenizer stay beside the new. A README.md that somebody has written is lost, however."""
    there = set(api.list_repo_files(repo_id))
    others = sorted(there - {path.name for path in sent} - {".gitattributes"})
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    lines = [f"{repo_id} holds other files, which stay there: {', '.join(others[:5])}{more}"] if others else []
    if "README.md" in there and MODEL_FILE.name not in there:  # of no earlier export
        lines.append(f"{repo_id} holds a README.md, which is replaced; its history keeps it")
    return "\n".join(lines)


def format_size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
