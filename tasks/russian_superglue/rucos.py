"""RuCoS: which entity of a news text fills the gap in a sentence about it? Token F1 and exact match of the answer.

Texts are longer than the model's input, so each is read in overlapping windows and every mention of an entity is scored
in some window; the best mention over all windows is the answer.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from src.models.heads import EntityChoiceModel
from tasks.finetuning import metrics, sources
from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.collator import PaddingCollator
from tasks.finetuning.encoding import EncodedSplit
from tasks.finetuning.metrics import normalize_answer
from tasks.finetuning.sources import field, integer
from tasks.finetuning.spans import Span, find_text, text_offsets, tokens_of_span
from tasks.finetuning.submission_format import check_fields, check_ids

PLACEHOLDER = "@placeholder"
LONG_MENTION = 16  # tokens; windows overlap by as much where they have the room, so that mentions are whole in one
INVISIBLE = "\u200b\ufeff"
FALLBACK_PATTERNS = (r"[A-ZА-ЯЁ]\w+(?:[ -][A-ZА-ЯЁ]\w+)*", r"\w+", r"\S+")


def trim_span(text: str, start: int, end: int) -> Span:
    """The span inside the text without spaces and invisible characters at its ends."""
    start, end = max(0, min(start, len(text))), max(0, min(end, len(text)))
    while start < end and (text[start].isspace() or text[start] in INVISIBLE):
        start += 1
    while start < end and (text[end - 1].isspace() or text[end - 1] in INVISIBLE):
        end -= 1
    return start, end


def answer_text(text: str, span: Span) -> str:
    return text[slice(*span)].translate(dict.fromkeys(map(ord, INVISIBLE)))


def shorten_query(tokenizer, query: str, *, gap: str, max_tokens: int) -> str:
    """The part of a query around its gap (a text in it) that has at most about max_tokens tokens."""
    encoding = tokenizer(query, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    if len(offsets) <= max_tokens:
        return query
    position = max(query.find(gap), 0)
    center = next((number for number, (_, end) in enumerate(offsets) if end > position), 0)
    first = max(0, min(center - max_tokens // 2, len(offsets) - max_tokens))
    return query[offsets[first][0] : offsets[first + max_tokens - 1][1]]


class EntityCollator(PaddingCollator):
    """Spreads the token spans of candidates to masks, [batch, candidates, length]."""

    def fields(self, row: Mapping) -> dict:
        masks = []
        for first, last in row["entity_spans"]:
            mask = np.zeros(len(row["input_ids"]), dtype=np.int8)
            mask[first : last + 1] = 1
            masks.append(mask)
        inputs = {name: value for name, value in row.items() if name not in ("entity_spans", "candidates")}
        return {**inputs, "entity_mask": masks}


class RuCoS(FinetuningTask):
    """Records: idx, text, query, candidates (spans (start, end) in the text), answers (spans and texts; None in test).

    Rows: entity_spans (first and last token of each candidate in this window), candidates (their numbers),
    labels (1 for a right candidate).
    """

    name = "RuCoS"
    labels = submission_labels = ()
    main_metric = "score"
    hub_config = None  # the hub's copy has no offsets and cuts entities one character too long
    num_test_records = 7257
    published_scores = {
        "human": {"f1": 0.93, "em": 0.89},
        "FRED-T5 1.7B": {"f1": 0.9, "em": 0.902},
        "RuLeanALBERT": {"f1": 0.9, "em": 0.902},
        "ruRoBERTa-large": {"f1": 0.87, "em": 0.867},
        "XLM-R-large": {"f1": 0.89, "em": 0.886},
        "ruBERT-large": {"f1": 0.81, "em": 0.805},
        "ruBERT-base": {"f1": 0.74, "em": 0.716},
        "majority": {"f1": 0.26, "em": 0.257},
        "TF-IDF": {"f1": 0.26, "em": 0.252},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        passage, queries = field(entry, "passage", dict, where), field(entry, "qas", list, where)
        text, entities = field(passage, "text", str, where), field(passage, "entities", list, where)
        if len(queries) != 1:
            raise ValueError(f"{where}: expected one query in 'qas', found {len(queries)}")
        query = field(queries[0], "query", str, where)
        if PLACEHOLDER not in query:
            raise ValueError(f"{where}: the query has no {PLACEHOLDER}")
        spans = [trim_span(text, field(e, "start", int, where), field(e, "end", int, where)) for e in entities]
        record = {
            "idx": integer(entry["idx"], "idx", where),
            "text": text,
            "query": query,
            "candidates": [list(span) for span in dict.fromkeys(spans) if span[0] < span[1]],
            "answers": self._parse_answers(queries[0], text, where, split=split),
        }
        return [record]

    def _parse_answers(self, query: Mapping, text: str, where: str, *, split: str) -> list[dict] | None:
        if split == "test" and not query.get("answers"):
            return None
        answers = field(query, "answers", list, where)
        if not answers:
            raise ValueError(f"{where}: the query has no answers")
        parsed = []
        for answer in answers:
            start, end = trim_span(text, field(answer, "start", int, where), field(answer, "end", int, where))
            parsed.append({"span": [start, end], "text": field(answer, "text", str, where).strip()})
        return parsed

    def candidates(self, record: Mapping, *, training: bool) -> list[Span]:
        """The entities of the text, in training with the gold answers that are not among them."""
        spans = [tuple(span) for span in record["candidates"]]
        for answer in (record["answers"] or ()) if training else ():
            span = tuple(answer["span"])
            if normalize_answer(answer_text(record["text"], span)) != normalize_answer(answer["text"]):
                span = find_text(record["text"], answer["text"], span[0])  # annotated somewhere else
            if span is not None and span not in spans:
                spans.append(span)
        return spans

    def is_answer(self, record: Mapping, span: Span) -> bool:
        answers = [answer["text"] for answer in record["answers"]]
        return bool(metrics.best_exact_match(answer_text(record["text"], span), answers))

    def windows(self, record: Mapping, tokenizer, *, max_length: int):
        """The query with each part of the text in turn; neighbours overlap by a quarter of the text's room or more."""
        gap = tokenizer.mask_token or PLACEHOLDER
        query = record["query"].replace(PLACEHOLDER, gap)
        query = shorten_query(tokenizer, query, gap=gap, max_tokens=max_length // 2)
        room = max_length - len(tokenizer(query, "", verbose=False)["input_ids"])
        return tokenizer(
            query,
            record["text"],
            truncation="only_second",
            max_length=max_length,
            stride=max(room // 4, min(room // 2, LONG_MENTION)),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        spans = self.candidates(record, training=training)
        encoding = self.windows(record, tokenizer, max_length=max_length)
        in_window = place_candidates(encoding, spans)
        report["record without candidates"] += not any(in_window)
        report["record in several windows"] += len(in_window) > 1
        rows = []
        for window, places in enumerate(in_window):
            right = {
                number for number in places if record["answers"] is not None and self.is_answer(record, spans[number])
            }
            if training:
                places = without_contradictions(places, right)
            if not places:
                continue
            row = {
                name: np.asarray(encoding[name][window], dtype=np.int32)
                for name in tokenizer.model_input_names
                if name in encoding
            }
            row["entity_spans"] = [(int(tokens[0]), int(tokens[-1])) for tokens in places.values()]
            row["candidates"] = list(places)
            if record["answers"] is not None:
                row["labels"] = [int(number in right) for number in places]
            rows.append(row)
        return rows

    def collator(self, tokenizer, *, pad_to_multiple_of: int | None = None) -> PaddingCollator:
        return EntityCollator(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def build_model(self, backbone: nn.Module, *, dropout: float) -> nn.Module:
        return EntityChoiceModel(backbone, dropout_prob=dropout)

    def record_scores(self, record: Mapping, rows: list[tuple[dict, np.ndarray]], encoded: EncodedSplit) -> np.ndarray:
        """The best score of each candidate over the windows; -inf for one in no window."""
        scores = np.full(len(self.candidates(record, training=encoded.training)), -np.inf)
        for row, logits in rows:
            for number, logit in zip(row["candidates"], logits, strict=False):  # the rest of the logits is padding
                scores[number] = max(scores[number], logit)
        return scores

    def choose(self, record: Mapping, scores: np.ndarray) -> str:
        """The text of the best candidate; of the first name in the text where the record has no candidates."""
        spans = self.candidates(record, training=len(scores) > len(record["candidates"]))
        if spans:
            return answer_text(record["text"], spans[int(np.argmax(scores))])
        matches = (re.search(pattern, record["text"]) for pattern in FALLBACK_PATTERNS)
        return next((match.group() for match in matches if match), "?")

    def score(self, predictions: Sequence[str], records: Sequence[Mapping]) -> dict[str, float]:
        answers = [[answer["text"] for answer in record["answers"]] for record in records]
        f1 = float(np.mean([metrics.best_token_f1(p, a) for p, a in zip(predictions, answers, strict=True)]))
        em = float(np.mean([metrics.best_exact_match(p, a) for p, a in zip(predictions, answers, strict=True)]))
        return {"f1": f1, "em": em, "score": (f1 + em) / 2}

    def is_labelled(self, records: Sequence[Mapping]) -> bool:
        return all(record["answers"] is not None for record in records)

    def majority_predictions(self, train: Sequence[Mapping], records: Sequence[Mapping]) -> list[str]:
        """The entity mentioned most often in each text, the first one of equals."""
        predictions = []
        for record in records:
            names = [normalize_answer(answer_text(record["text"], span)) for span in record["candidates"]]
            counts = Counter(names)
            predictions.append(self.choose(record, np.asarray([counts[name] for name in names], dtype=float)))
        return predictions

    def baseline_texts(self, record: Mapping) -> list[str]:
        names = [answer_text(record["text"], span) for span in record["candidates"]]
        return [record["query"].replace(PLACEHOLDER, name) for name in names]

    def baseline_targets(self, record: Mapping) -> list[int]:
        return [int(self.is_answer(record, span)) for span in record["candidates"]]

    def submission_entries(self, records: Sequence[Mapping], predictions: Sequence[str]) -> list[dict]:
        return [{"idx": r["idx"], "label": label} for r, label in zip(records, predictions, strict=True)]

    def check_submission(self, path: Path, records: Sequence[Mapping] | None = None) -> None:
        found = []
        for where, entry in sources.read_json_lines(path):
            check_fields(entry, {"idx", "label"}, where)
            if not field(entry, "label", str, where).strip():
                raise ValueError(f"{where}: the label is empty, expected the text of an entity")
            found.append((where, entry["idx"]))
        expected = range(self.num_test_records) if records is None else [record["idx"] for record in records]
        check_ids(path, found, expected=expected)


def without_contradictions(places: Mapping[int, np.ndarray], right: set[int]) -> dict[int, np.ndarray]:
    """The candidates of a window less the wrong ones that have exactly the tokens of a right one.

    The answer "Пхеньян" is annotated within the entity "Пхеньяном" at times; the same tokens cannot be both.
    """
    tokens_of_right = {tuple(places[number]) for number in right}
    return {n: tokens for n, tokens in places.items() if n in right or tuple(tokens) not in tokens_of_right}


def place_candidates(encoding, spans: Sequence[Span]) -> list[dict[int, np.ndarray]]:
    """For each window, the candidates in it: number -> token positions.

    A candidate counts where it is whole; one that is whole in no window counts wherever a part of it is, so every
    candidate that has a token is scored.
    """
    windows = [text_offsets(encoding, 1, window=number) for number in range(len(encoding["input_ids"]))]
    places = [[tokens_of_span(offsets, span) for span in spans] for offsets in windows]
    longest = [max(map(len, tokens)) for tokens in zip(*places, strict=True)]  # of each candidate
    return [
        {number: tokens for number, tokens in enumerate(window) if 0 < len(tokens) == longest[number]}
        for window in places
    ]
