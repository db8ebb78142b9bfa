"""Pseudo-log-likelihoods in batches against one mask at a time: `python -m benchmarks.rublimp_speed`.

    python -m benchmarks.rublimp_speed --model-name MODEL --data-dir DATA    # any masked model, on pairs of RuBLiMP

Without a model a LeanALBERT and a BERT of the same size with random weights (hidden 256, 4 layers) score sentences of
the demo's corpus. Both sides must agree to 1e-4 in every sentence.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.measure import Row, clock_of, interleave, options, ratio, report
from benchmarks.reference.pseudo_likelihood import plain_likelihood
from src.models import LeanAlbertConfig, LeanAlbertForMaskedLM
from src.models.tokenizer import load_tokenizer
from tasks.finetuning.backbone import find_pretrained
from tasks.mlm.inspect_data import DEMO_TOKENIZER
from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import DEFAULT_SOURCE, iterate_documents
from tasks.rublimp.pairs import read_pairs
from tasks.rublimp.pseudo_likelihood import PseudoLikelihood

CLAIM = "pseudo-log-likelihoods"
PLAIN, OURS = "one mask at a time", "in batches"
TOLERANCE = 1e-4
MAX_CHARACTERS = 150  # of a sentence: RuBLiMP's have 60 on average


def random_models(tokenizer) -> dict[str, torch.nn.Module]:
    size = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    torch.manual_seed(0)
    own = LeanAlbertConfig(vocab_size=len(tokenizer), share_large_matrices=1, **size)
    return {
        "LeanALBERT": LeanAlbertForMaskedLM(own),
        "BERT": BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size)),
    }


def demo_sentences(number: int) -> list[str]:
    found = []
    for document in iterate_documents(DEFAULT_SOURCE):
        found += [sentence for sentence in split_sentences(document) if len(sentence) <= MAX_CHARACTERS]
        if len(found) >= number:
            break
    return found[:number]


def measure(name: str, model, tokenizer, texts: list[str], arguments: argparse.Namespace) -> list[Row]:
    model.eval()
    batched = PseudoLikelihood(model, tokenizer)
    answers: dict[str, list[tuple[float, int]]] = {}

    def run(side: str, score: Callable) -> None:
        answers[side] = score()

    timings = interleave(
        {
            PLAIN: lambda: run(PLAIN, lambda: [plain_likelihood(model, tokenizer, text) for text in texts]),
            OURS: lambda: run(OURS, lambda: [(one.total, one.num_tokens) for one in batched(texts)]),
        },
        rounds=1 if arguments.quick else 5,
        clock=clock_of("cpu", arguments.threads),
        seconds=90,
    )
    apart = max(abs(a - b) for (a, _), (b, _) in zip(answers[PLAIN], answers[OURS], strict=True))
    counts = [[number for _, number in answers[side]] for side in (PLAIN, OURS)]
    if apart > TOLERANCE or counts[0] != counts[1]:
        raise SystemExit(f"{name}: the sides disagree by {apart:.2g} in a sentence")
    case = f"{name}, {len(texts)} sentences of {sum(counts[0]) / len(texts):.0f} tokens, threads {arguments.threads}"
    print(f"{case}: at most {apart:.1e} apart")
    faster = 1 / ratio(timings[OURS], timings[PLAIN])
    return [
        Row(CLAIM, case, PLAIN, timings[PLAIN].median, "s"),
        Row(CLAIM, case, OURS, timings[OURS].median, "s", ratio=faster, target=">= 1.8", peer=PLAIN),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model-name", help="a masked model of the hub, or a directory (default: random weights)")
    parser.add_argument("--data-dir", type=Path, help="holds RuBLiMP/PARADIGM.csv (default: the demo's sentences)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    number = 6 if arguments.quick else 16
    texts = demo_sentences(number)
    if arguments.data_dir is not None:
        pairs = read_pairs(arguments.data_dir, pairs_each=1)
        texts = [text for pair in pairs for text in pair.texts][:number]
    if arguments.model_name is not None:
        found = find_pretrained(arguments.model_name, None)
        tokenizer, models = found.tokenizer, {found.name: found.load_masked_model()}
    else:
        tokenizer = load_tokenizer(DEMO_TOKENIZER)
        models = random_models(tokenizer)
    rows = [row for name, model in models.items() for row in measure(name, model, tokenizer, texts, arguments)]
    notes = [
        "The ratio is how many times faster than one forward pass a token. One thread: CPU seconds; two: wall time."
    ]
    report("rublimp_speed", "Pseudo-log-likelihoods of sentences", rows, notes, arguments.results)


if __name__ == "__main__":
    main()
