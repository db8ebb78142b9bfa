"""From raw text to padded batches, against the original's way: `python -m benchmarks.data_pipeline`.

Text: made from the bundled one, the same on every machine (`benchmarks.made_text`); a Unigram tokenizer of 32,000
pieces is trained on it once and kept in outputs/.
"""

import argparse
import itertools
import math
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.made_text import make_documents
from benchmarks.measure import Row, interleave, options, ratio, report
from benchmarks.reference.instances import make_instances
from src.models.tokenizer import load_tokenizer, raw_tokenizer
from tasks.mlm.data import make_training_dataset
from tasks.mlm.sentences import split_sentences
from tasks.mlm.train_tokenizer import train_tokenizer
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENIZER = REPOSITORY / "outputs" / "benchmarks" / "tokenizer-of-made-text"
NUM_CHARACTERS = 7_000_000
CLAIM = "instances from raw text"
BATCH_SIZE = 32
PADDING_TARGETS = {256: "<= 0.04", 512: "<= 0.04", 2048: "<= 0.1"}


def load_corpus(directory: Path) -> tuple[list[str], object]:
    """Documents and a tokenizer."""
    documents = list(make_documents(NUM_CHARACTERS))
    if not TOKENIZER.is_dir():
        source = write_documents(directory / "all.txt", documents[: len(documents) // 2])
        flags = {"vocab_size": 32_000, "output": TOKENIZER, "held_out": None, "max_documents": None}
        train_tokenizer(argparse.Namespace(sources=[source], **flags))
    return documents, load_tokenizer(TOKENIZER)


def write_documents(path: Path, documents: list[str]) -> str:
    path.write_text("\n\n".join("\n".join(text.split("\n\n")) for text in documents), encoding="utf-8")
    return str(path)


class Part:
    """Some documents as a source, and an iterator over their instances that has not begun."""

    def __init__(self, path: Path, documents: list[str], tokenizer, raw):
        self.documents = documents
        self.num_characters = sum(map(len, documents))
        self.sentences = [sentence for document in documents for sentence in split_sentences(document)]
        self.num_tokens = encode_batches(raw, self.sentences)
        self.dataset = make_training_dataset(
            tokenizer, sources=write_documents(path, documents), shuffle_seed=0, batch_size=BATCH_SIZE
        )
        self.iterator = iter(self.dataset)

    def read(self) -> None:
        """Instances until every token of the documents has been used."""
        start = self.dataset._stream.num_tokens
        while self.dataset._stream.num_tokens - start < self.num_tokens:
            next(self.iterator)


def encode_batches(raw, sentences: list[str]) -> int:
    num_tokens = 0
    for start in range(0, len(sentences), 256):
        batch = raw.encode_batch_fast(sentences[start : start + 256], add_special_tokens=False)
        num_tokens += sum(len(encoding.ids) for encoding in batch)
    return num_tokens


def run_original(part: Part, tokenizer) -> int:
    generator = random.Random(0)
    return sum(1 for _ in make_instances(part.documents, tokenizer, max_sequence_length=512, generator=generator))


def measure_speed(documents: list[str], tokenizer, directory: Path, *, rounds: int) -> list[Row]:
    """Characters per second. Each round reads other documents, and our memory of words begins empty."""
    raw = raw_tokenizer(tokenizer)
    parts = [
        Part(directory / f"{number}.txt", documents[number :: rounds + 1], tokenizer, raw)
        for number in range(rounds + 1)
    ]
    original, alone, ours = iter(parts), iter(parts), iter(parts)
    times = interleave(
        {
            "original": lambda: run_original(next(original), tokenizer),
            "batch encode alone": lambda: encode_batches(raw, next(alone).sentences),
            "ours": lambda: next(ours).read(),
        },
        rounds=rounds,
        seconds=25,
    )
    characters = sum(part.num_characters for part in parts[1:]) / rounds / 1e6
    case = f"{characters:.2f} million characters of unseen text, length 512"
    rows = [Row(CLAIM, case, side, characters / timing.median, "Mchar/s") for side, timing in times.items()]
    for peer, target in (("original", ">= 3.4"), ("batch encode alone", ">= 0.9")):
        faster = 1 / ratio(times["ours"], times[peer])
        value = characters / times["ours"].median
        rows.append(Row(CLAIM, case, f"ours over {peer}", value, "Mchar/s", ratio=faster, target=target, peer=peer))
    return rows


def measure_warm_speed(documents: list[str], tokenizer, directory: Path, *, rounds: int) -> list[Row]:
    """As above, late in a stream: the words of what came before are known, the text itself is new."""
    raw, half = raw_tokenizer(tokenizer), len(documents) // 2
    whole = Part(directory / "whole.txt", documents[:half], tokenizer, raw)
    whole.read()
    later = [split_sentences(document) for document in documents[half:]]
    encoder = whole.dataset._stream.sources[0].encoder
    batches = [list(itertools.chain(*later[number :: rounds + 1])) for number in range(rounds + 1)]
    alone, ours = iter(batches), iter(batches)
    times = interleave(
        {
            "batch encode alone": lambda: encode_batches(raw, next(alone)),
            "ours": lambda: encode_in_batches(encoder, next(ours)),
        },
        rounds=rounds,
        seconds=10,
    )
    case = f"sentences to ids after {whole.num_characters / 1e6:.1f} million characters"
    characters = sum(len(sentence) for batch in batches[1:] for sentence in batch) / rounds / 1e6
    faster = 1 / ratio(times["ours"], times["batch encode alone"])
    return [
        Row(CLAIM, case, "batch encode alone", characters / times["batch encode alone"].median, "Mchar/s"),
        Row(CLAIM, case, "ours", characters / times["ours"].median, "Mchar/s", ratio=faster, peer="batch encode alone"),
    ]


def encode_in_batches(encoder, sentences: list[str]) -> None:
    for start in range(0, len(sentences), 256):
        encoder.encode(sentences[start : start + 256])


def cut_short_documents(documents: list[str], num_documents: int) -> list[str]:
    """Pieces of the text with log-normal lengths, the median 1,200 characters, cut between sentences."""
    generator = random.Random(0)
    sentences = itertools.cycle(sentence for document in documents for sentence in split_sentences(document))
    pieces = []
    for _ in range(num_documents):
        wanted, piece = generator.lognormvariate(math.log(1200), 1.0), [next(sentences)]
        while sum(map(len, piece)) + len(piece) < wanted:
            piece.append(next(sentences))
        pieces.append(" ".join(piece))
    return pieces


def measure_padding(documents: list[str], tokenizer, directory: Path, *, num_batches: int) -> list[Row]:
    """Shares of padding in batches of 32, and of the text that is thrown away; exact for the given text and seed."""
    pieces = cut_short_documents(documents, 4000)
    source = write_documents(directory / "short.txt", pieces)
    median = statistics.median(map(len, pieces))
    rows = []
    for length, target in PADDING_TARGETS.items():
        case = f"length {length}, documents of median {median:.0f} characters"
        for side, flags, limit, multiple in (
            ("padded to the length", {}, None, length),
            ("batches at random", {}, None, 1),
            ("bucketed", {"batch_size": BATCH_SIZE}, target, 1),
            ("bucketed, multiples of 16", {"batch_size": BATCH_SIZE}, None, 16),
            ("bucketed, multiples of 128", {"batch_size": BATCH_SIZE}, None, 128),
            ("packed", {"pack_sequences": True}, "<= 0.01", 128),
        ):
            dataset = make_training_dataset(
                tokenizer, sources=source, shuffle_seed=0, max_sequence_length=length, **flags
            )
            collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=multiple, seed=0)
            # A packed row holds several instances.
            share = padding_share(dataset, collator, num_batches // 6 if "pack_sequences" in flags else num_batches)
            rows.append(Row("padding", case, side, share, "share", target=limit))
        rows.append(Row("text thrown away", case, "ours", dataset.discarded_share(), "share", target="<= 0.01"))
        rows.append(
            Row("text thrown away", case, "original", original_discards(pieces[:300], tokenizer, length), "share")
        )
    return rows


def padding_share(dataset, collator, num_batches: int) -> float:
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=collator)
    real = positions = 0
    for batch in itertools.islice(loader, num_batches):
        real += int(batch["attention_mask"].sum())
        positions += batch["attention_mask"].numel()
    return 1 - real / positions


def original_discards(documents: list[str], tokenizer, length: int) -> float:
    total = sum(len(tokenizer.encode(document, add_special_tokens=False)) for document in documents)
    instances = make_instances(documents, tokenizer, max_sequence_length=length, generator=random.Random(0))
    return 1 - sum(len(each["input_ids"]) - 3 for each in instances) / total


def main() -> None:
    arguments = options(sys.modules[__name__].__doc__).parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for all sides
    torch.set_num_threads(1)
    rounds = 2 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        documents, tokenizer = load_corpus(directory)
        size = (15 if arguments.quick else 50) * (rounds + 1)  # 0.5 million characters a round
        rows = measure_speed(documents[:size], tokenizer, directory, rounds=rounds)
        rows += measure_warm_speed(documents[: 2 * size], tokenizer, directory, rounds=rounds)
        rows += measure_padding(documents[-40:], tokenizer, directory, num_batches=20 if arguments.quick else 30)
    notes = [
        "Text made from the bundled one, Unigram tokenizer of 32,000 pieces. Speeds: one thread, CPU time. Padding: "
        f"batches of {BATCH_SIZE}."
    ]
    report("data_pipeline", "From raw text to padded batches", rows, notes, arguments.results)


if __name__ == "__main__":
    main()
