"""Train a Unigram tokenizer for Russian text (arXiv:1804.10959): `python -m tasks.mlm.train_tokenizer --help`.

The pieces come from the sentencepiece trainer, not from `tokenizers.trainers.UnigramTrainer`: on 28 MB of Russian prose
and 8,000 pieces that one gave 2.90 characters per token on held-out text, this one 3.40.
"""

import argparse
import io
import itertools
import json
import re
import string
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from src.files import replaced_directory
from tasks.mlm.sources import iterate_documents

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
UNK_ID, CLS_ID, SEP_ID = 1, 2, 3

# Always in the vocabulary, however rare in the text: А-я, Ё, ё; the last one is the stress mark.
ALPHABET = "".join(map(chr, range(0x410, 0x450))) + "Ёё" + string.ascii_letters + string.digits
ALPHABET += string.punctuation + "«»—–…„“”’‘№°§€₽\u0301"
CHARACTER_COVERAGE = 0.9999  # share of the text spelled with the characters that get a piece

HELD_OUT_INTERVAL = 20  # without --held_out one document in twenty is kept for the measurement
MAX_HELD_OUT = 1000
FILES = ("config.json", "special_tokens_map.json", "tokenizer.json")


def build_normalizer() -> normalizers.Normalizer:
    """Control characters become blanks, invisible ones go, и + breve becomes й. Case stays, and so do № and …"""
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"[\u0000-\u001f\u007f-\u009f]"), " "),
            normalizers.Replace(Regex(r"[\u00ad\u200b\ufeff]"), ""),
            normalizers.NFC(),
        ]
    )


def build_tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """A tokenizer whose words (runs without whitespace) each begin with ▁ and are segmented one by one."""
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNK_ID))
    tokenizer.normalizer = build_normalizer()
    metaspace = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.add_special_tokens(
        [AddedToken(token, lstrip=token == MASK, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(CLS, CLS_ID), (SEP, SEP_ID)],
    )
    return tokenizer


def count_words(documents: Iterable[str]) -> Counter:
    normalizer = build_normalizer()
    counts = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document).split())
    return counts


def explain_failure(message: str, vocab_size: int, num_words: int) -> str:
    """sentencepiece's two complaints about the size of the vocabulary, in terms of our flag."""
    text = f"a text of {num_words} different words"
    if too_large := re.search(r"set it to a value <= (\d+)", message):
        return f"--vocab_size {vocab_size}: {text} gives at most {too_large[1]} pieces; ask for fewer or add text"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"--vocab_size {vocab_size}: the single characters of {text} alone need more than {too_small[1]} pieces"
    return f"--vocab_size {vocab_size}: sentencepiece could not be trained on {text} ({message})"


def train_pieces(word_counts: Counter, vocab_size: int) -> list[tuple[str, float]]:
    """`vocab_size` pieces with their log probabilities, the special tokens first. Equal counts give equal pieces.

    Raises ValueError when the text is too small for that many pieces, or there are fewer than its characters need.
    """
    if vocab_size < 1:
        raise ValueError(f"--vocab_size {vocab_size} is not a positive number")
    if not word_counts:
        raise ValueError("the text to train on is empty; give sources with text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in sorted(word_counts.items())),
            input_format="tsv",
            model_writer=model,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            required_chars=ALPHABET,
            character_coverage=CHARACTER_COVERAGE,
            pad_id=SPECIAL_TOKENS.index(PAD),
            unk_id=UNK_ID,
            bos_id=-1,
            eos_id=-1,
            control_symbols=[CLS, SEP, MASK],
            num_threads=1,  # sums in one order: the same text gives the same pieces
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(explain_failure(str(error), vocab_size, len(word_counts))) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(processor.id_to_piece(index), processor.get_score(index)) for index in range(len(processor))]


def check_output(output: Path) -> None:
    """ValueError when something would be lost by replacing the directory."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a directory")
    others = sorted(path.name for path in output.iterdir() if path.name not in FILES) if output.is_dir() else []
    if others:
        raise ValueError(f"--output {output} holds other files ({', '.join(others)[:80]}); name another directory")


def save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Write the whole directory, so that `output` is never half a tokenizer."""
    mask = {"content": MASK, "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    roles = {"bos_token": CLS, "cls_token": CLS, "eos_token": SEP, "sep_token": SEP, "pad_token": PAD, "unk_token": UNK}
    config = {"model_type": "lean_albert", "vocab_size": tokenizer.get_vocab_size()}
    config |= {"pad_token_id": SPECIAL_TOKENS.index(PAD), "bos_token_id": CLS_ID, "eos_token_id": SEP_ID}

    with replaced_directory(output.resolve()) as folder:
        for name, content in (("config.json", config), ("special_tokens_map.json", roles | {"mask_token": mask})):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(str(folder / "tokenizer.json"))


def measure(tokenizer: Tokenizer, documents: Iterable[str]) -> dict[str, float]:
    """Share of <unk> among the tokens, characters per token, tokens per word; special tokens not counted."""
    tokens = unknown = characters = words = 0
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        tokens += len(ids)
        unknown += ids.count(UNK_ID)
        characters += len(document)
        words += len(document.split())
    if not tokens:
        raise ValueError("the held-out text is empty; give --held_out sources with text")
    return {
        "unknown_share": unknown / tokens,
        "characters_per_token": characters / tokens,
        "tokens_per_word": tokens / words,
    }


def hold_out(documents: Iterable[str], held_out: list[str]) -> Iterator[str]:
    """The documents without one in twenty (at most MAX_HELD_OUT), which are appended to `held_out`."""
    for number, document in enumerate(documents):
        if number % HELD_OUT_INTERVAL == 1 and len(held_out) < MAX_HELD_OUT:
            held_out.append(document)
        else:
            yield document


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.mlm.train_tokenizer",
        description="Train a Unigram tokenizer that keeps case, й and ё, and measure it on held-out text.",
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        required=True,
        help=".txt (documents separated by blank lines), .jsonl, .jsonl.gz or .parquet files, globs, or name[:config] "
        "of a Hugging Face dataset",
    )
    parser.add_argument("--vocab_size", type=int, required=True, help="pieces, the five special tokens included")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; an older tokenizer is replaced")
    parser.add_argument("--held_out", nargs="+", help="sources to measure on (default: one document in twenty)")
    parser.add_argument("--max_documents", type=int, help="train on the first so many documents only (default: all)")
    return parser.parse_args(arguments)


def train_tokenizer(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    documents = itertools.islice(iterate_documents(arguments.sources), arguments.max_documents)
    if arguments.held_out:
        held_out = list(iterate_documents(arguments.held_out))
    else:
        held_out = []
        documents = hold_out(documents, held_out)
    word_counts = count_words(documents)
    if not held_out:
        raise ValueError("the text is a single document, none is left to measure on; give --held_out")
    tokenizer = build_tokenizer(train_pieces(word_counts, arguments.vocab_size))
    figures = measure(tokenizer, held_out)
    save_tokenizer(tokenizer, arguments.output)
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} pieces from {word_counts.total()} words of text")
    print(
        f"{len(held_out)} held-out documents: {figures['unknown_share']:.4%} unknown tokens, "
        f"{figures['characters_per_token']:.3f} characters per token, {figures['tokens_per_word']:.3f} tokens per word"
    )


def main() -> None:
    try:
        train_tokenizer(parse_arguments())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
