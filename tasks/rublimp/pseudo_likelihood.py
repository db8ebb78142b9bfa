"""Pseudo-log-likelihoods of sentences by a masked language model (Salazar et al., arXiv 1910.14659).

Of each token, special ones left out, the log-probability where it alone is masked; with ``by_word`` where the tokens of
its word that follow it are masked, too (Kauf and Ivanova, arXiv 2305.10588). Natural logarithms.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tasks.finetuning.backbone import max_positions
from tasks.finetuning.console import InputError
from tasks.finetuning.inference import free_memory, is_out_of_memory
from tasks.rublimp.pairs import Pair

TOKENS_AT_ONCE = 2048
# Of logits, where a model computes them at all positions: 256 MB of them, and the same again for their softmax.
MAX_LOGITS = 2**26


@dataclass(frozen=True)
class Encoded:
    """A sentence as a model reads it, and which positions are hidden from it together, of which the first is asked."""

    inputs: dict[str, list[int]]
    hidden: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Likelihood:
    """The sum over a sentence's tokens, and their number."""

    total: float
    num_tokens: int


def check_tokenizer(tokenizer, *, by_word: bool) -> None:
    """Raises ValueError for a tokenizer with which sentences cannot be scored."""
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no mask token: this is no masked language model")
    if by_word and not tokenizer.is_fast:
        raise ValueError(
            f"--form word: the tokenizer {tokenizer.name_or_path} does not tell where in the text its tokens are (it "
            "has no fast version); take --form mean or sum"
        )


def longest_input(model: nn.Module, tokenizer) -> int:
    """Tokens, special ones included."""
    limits = (tokenizer.model_max_length, max_positions(model.base_model))
    return int(min(limit for limit in limits if limit is not None))


def divide_by_length(pairs: Sequence[Pair], tokenizer, longest: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs of which both sentences have at most so many tokens, and the others."""
    short, long = [], []
    for pair in pairs:
        lengths = [len(ids) for ids in tokenizer(list(pair.texts), verbose=False)["input_ids"]]
        (short if max(lengths) <= longest else long).append(pair)
    return short, long


def encode(tokenizer, text: str, *, by_word: bool) -> Encoded:
    encoding = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=by_word, verbose=False)
    asked = [position for position, special in enumerate(encoding["special_tokens_mask"]) if not special]
    names = [name for name in tokenizer.model_input_names if name in encoding and name != "attention_mask"]
    hidden = [(position,) for position in asked]
    if by_word:
        words = split_words(text, [encoding["offset_mapping"][position] for position in asked])
        hidden = [tuple(asked[token] for token in word[place:]) for word in words for place in range(len(word))]
    return Encoded({name: list(encoding[name]) for name in names}, tuple(hidden))


def split_words(text: str, offsets: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The numbers of the tokens of each word: a run of letters, marks and digits; anything else stands alone.

    offsets: where each token begins and ends in the text. A piece that is but a blank belongs to what follows it.
    """
    words: list[list[int]] = []
    before_start = before_end = 0
    for token, (start, end) in enumerate(offsets):
        before, piece = text[before_start:before_end], text[start:end]
        is_part_of_character = start < before_end
        is_next = start == before_end and (not before.strip() or (_in_word(before[-1:]) and _in_word(piece[:1])))
        if words and (is_part_of_character or is_next):
            words[-1].append(token)
        else:
            words.append([token])
        before_start, before_end = start, end
    return words


def _in_word(character: str) -> bool:
    return character != "" and unicodedata.category(character)[0] in "LMN"


class PseudoLikelihood:
    """Scores sentences with ``model``; masked copies of several sentences are computed together, sorted by length.

    Where a batch does not fit into memory, smaller ones are tried, and kept to.
    """

    def __init__(self, model: nn.Module, tokenizer, *, by_word: bool = False, tokens_at_once: int = TOKENS_AT_ONCE):
        check_tokenizer(tokenizer, by_word=by_word)
        self.model, self.tokenizer, self.by_word = model.eval(), tokenizer, by_word
        self.tokens_at_once = tokens_at_once
        self.decoder = model.get_output_embeddings()

    def encode(self, text: str) -> Encoded:
        return encode(self.tokenizer, text, by_word=self.by_word)

    def __call__(self, texts: Sequence[str]) -> list[Likelihood]:
        sentences = [self.encode(text) for text in texts]
        # the same tokens have the same score, to the last bit: whether a pair is a tie depends on no batch
        distinct = list({tuple(sentence.inputs["input_ids"]): sentence for sentence in sentences}.values())
        while True:
            try:
                totals = self._totals(distinct)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.tokens_at_once <= max(sentence.length for sentence in distinct):
                    raise MemoryError("out of memory even with one masked sentence at a time") from error
            free_memory()
            self.tokens_at_once //= 2
        total_of = {tuple(s.inputs["input_ids"]): total for s, total in zip(distinct, totals, strict=True)}
        return [Likelihood(total_of[tuple(s.inputs["input_ids"])], len(s.hidden)) for s in sentences]

    @torch.no_grad()
    def _totals(self, sentences: Sequence[Encoded]) -> list[float]:
        totals = [0.0] * len(sentences)
        rows = [(number, hidden) for number, sentence in enumerate(sentences) for hidden in sentence.hidden]
        rows.sort(key=lambda row: sentences[row[0]].length)
        for batch in self._batches(rows, sentences):
            found = self._log_probabilities([(sentences[number], hidden) for number, hidden in batch])
            if not bool(torch.isfinite(found).all()):
                raise InputError(
                    "the model's answers are not finite numbers: its weights are damaged, or have diverged"
                )
            for (number, _), value in zip(batch, found.tolist(), strict=True):
                totals[number] += value
        return totals

    def _batches(self, rows: Sequence[tuple], sentences: Sequence[Encoded]) -> Iterator[Sequence[tuple]]:
        """Rows that go through the model together; the last of them is the longest."""
        limit = self.tokens_at_once
        if self.decoder is None:
            limit = min(limit, max(1, MAX_LOGITS // self.model.config.vocab_size))
        start = 0
        for end in range(1, len(rows) + 1):
            is_full = end < len(rows) and (end + 1 - start) * sentences[rows[end][0]].length > limit
            if is_full or end == len(rows):
                yield rows[start:end]
                start = end

    def _log_probabilities(self, rows: Sequence[tuple[Encoded, tuple[int, ...]]]) -> torch.Tensor:
        """[rows]: of the first hidden token of each."""
        device = next(self.model.parameters()).device
        length = max(sentence.length for sentence, _ in rows)
        padding = {"input_ids": self.tokenizer.pad_token_id or 0}
        inputs = {
            name: torch.tensor([s.inputs[name] + [padding.get(name, 0)] * (length - s.length) for s, _ in rows])
            for name in rows[0][0].inputs
        }  # each [rows, length]
        columns = torch.tensor([hidden[0] for _, hidden in rows])
        targets = inputs["input_ids"].gather(1, columns[:, None]).squeeze(1)
        hidden_rows = torch.tensor([row for row, (_, hidden) in enumerate(rows) for _ in hidden])
        hidden_columns = torch.tensor([column for _, hidden in rows for column in hidden])
        inputs["input_ids"][hidden_rows, hidden_columns] = self.tokenizer.mask_token_id
        if any(sentence.length < length for sentence, _ in rows):
            real = torch.tensor([sentence.length for sentence, _ in rows])[:, None]
            inputs["attention_mask"] = (torch.arange(length)[None] < real).long()
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        logits = self._logits_at(columns.to(device), inputs)
        return -F.cross_entropy(logits.float(), targets.to(device), reduction="none")

    def _logits_at(self, columns: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[rows, vocabulary]: logits at one column of each row.

        What goes into the decoder, a matrix as large as the vocabulary, is cut down to these columns. A model that
        does not call its decoder as a module computes all logits.
        """
        rows, length = inputs["input_ids"].shape
        index = torch.arange(rows, device=columns.device)

        def pick(_module, arguments):
            states = arguments[0]  # [rows, length, size]
            return (states[index, columns][:, None],) if states.shape[:2] == (rows, length) else None

        hook = self.decoder.register_forward_pre_hook(pick) if self.decoder is not None else None
        try:
            logits = self.model(**inputs).logits
        finally:
            if hook is not None:
                hook.remove()
        if logits.shape[1] == 1:
            return logits[:, 0]
        self.decoder = None
        return logits[index, columns]
