"""MuSeRC: which answers to a question about a passage are right? F1 over all answers, exact match by question."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from tasks.finetuning import metrics, sources
from tasks.finetuning.base import FinetuningTask
from tasks.finetuning.encoding import encode_text, model_inputs, with_label
from tasks.finetuning.sources import field, integer
from tasks.finetuning.submission_format import check_fields, check_ids


def answer_id(record: Mapping) -> tuple[int, int, int]:
    return record["passage_idx"], record["question_idx"], record["answer_idx"]


def check_unique(ids: Sequence[int], what: str, where: str) -> None:
    for identifier, count in Counter(ids).items():
        if count > 1:
            raise ValueError(f"{where}: duplicate {what} idx {identifier} in one passage")


class MuSeRC(FinetuningTask):
    """Records, one an answer: passage_idx, question_idx, answer_idx, passage, question, answer, label."""

    name = "MuSeRC"
    labels = submission_labels = (0, 1)
    main_metric = "score"
    hub_config = "muserc"
    num_test_records = 322  # passages, with 1813 questions and 7614 answers
    num_test_answers = 7614
    published_scores = {
        "human": {"f1a": 0.806, "em": 0.42},
        "FRED-T5 1.7B": {"f1a": 0.916, "em": 0.773},
        "RuLeanALBERT": {"f1a": 0.874, "em": 0.654},
        "ruRoBERTa-large": {"f1a": 0.861, "em": 0.63},
        "XLM-R-large": {"f1a": 0.809, "em": 0.501},
        "ruBERT-large": {"f1a": 0.778, "em": 0.436},
        "ruBERT-base": {"f1a": 0.742, "em": 0.399},
        "majority": {"f1a": 0.671, "em": 0.237},
        "TF-IDF": {"f1a": 0.587, "em": 0.242},
    }

    def parse(self, entry: Mapping, where: str, *, split: str) -> list[dict]:
        passage = field(entry, "passage", dict, where)
        text = field(passage, "text", str, where)
        records = []
        for question in field(passage, "questions", list, where):
            for answer in field(question, "answers", list, where):
                record = {
                    "passage_idx": integer(entry["idx"], "idx", where),
                    "question_idx": field(question, "idx", int, where),
                    "answer_idx": field(answer, "idx", int, where),
                    "passage": text,
                    "question": field(question, "question", str, where),
                    "answer": field(answer, "text", str, where),
                    "label": self.parse_label(answer, where, split=split),
                }
                records.append(record)
        if not records:
            raise ValueError(f"{where}: a passage without questions or answers")
        check_unique([field(question, "idx", int, where) for question in passage["questions"]], "question", where)
        check_unique([record["answer_idx"] for record in records], "answer", where)
        return records

    def from_hub(self, rows) -> list[tuple[str, dict]]:
        """The hub has one row an answer, in the order of the official file."""
        entries = []
        for passage_idx, passage_rows in groupby(rows, key=lambda row: row[1]["idx"]["paragraph"]):
            passage_rows = list(passage_rows)
            where, first = passage_rows[0]
            questions = []
            for question_idx, group in groupby(passage_rows, key=lambda row: row[1]["idx"]["question"]):
                group = [row for _, row in group]
                answers = [
                    {"idx": row["idx"]["answer"], "text": row["answer"]}
                    | ({"label": row["label"]} if row["label"] >= 0 else {})
                    for row in group
                ]
                questions.append({"idx": question_idx, "question": group[0]["question"], "answers": answers})
            entries.append(
                (where, {"idx": passage_idx, "passage": {"text": first["paragraph"], "questions": questions}})
            )
        return entries

    def encode(self, record: Mapping, tokenizer, *, max_length: int, training: bool, report: Counter) -> list[dict]:
        question = f"{record['question']} {record['answer']}"
        encoding = encode_text(tokenizer, record["passage"], question, max_length=max_length, keep="second")
        return [with_label(model_inputs(tokenizer, encoding), record)]

    def score(self, predictions: Sequence[int], records: Sequence[Mapping]) -> dict[str, float]:
        labels = [record["label"] for record in records]
        questions = [answer_id(record)[:2] for record in records]
        f1a = metrics.binary_f1(labels, predictions)
        exact_match = metrics.group_exact_match(labels, predictions, questions)
        return {"f1a": f1a, "em": exact_match, "score": (f1a + exact_match) / 2}

    def baseline_texts(self, record: Mapping) -> list[str]:
        return [f"{record['question']} {record['answer']}"]

    def submission_entries(self, records: Sequence[Mapping], predictions: Sequence[int]) -> list[dict]:
        passages = {}
        for record, prediction in zip(records, predictions, strict=True):
            questions = passages.setdefault(record["passage_idx"], {})
            answers = questions.setdefault(record["question_idx"], [])
            answers.append({"idx": record["answer_idx"], "label": int(prediction)})
        return [
            {
                "idx": passage,
                "passage": {"questions": [{"idx": idx, "answers": answers} for idx, answers in questions.items()]},
            }
            for passage, questions in passages.items()
        ]

    def check_submission(self, path: Path, records: Sequence[Mapping] | None = None) -> None:
        passages, answers = [], []
        for where, entry in sources.read_json_lines(path):
            check_fields(entry, {"idx", "passage"}, where)
            passages.append((where, entry["idx"]))
            for question in field(field(entry, "passage", dict, where), "questions", list, where):
                check_fields(question, {"idx", "answers"}, where)
                for answer in field(question, "answers", list, where):
                    check_fields(answer, {"idx", "label"}, where)
                    sources.label_index(answer, self.labels, where, required=True)
                    answers.append((where, (entry["idx"], question["idx"], answer["idx"])))
        if records is not None:
            check_ids(path, passages, expected=dict.fromkeys(record["passage_idx"] for record in records))
            check_ids(path, answers, expected=map(answer_id, records), what="[passage, question, answer]")
            return
        check_ids(path, passages, expected=range(self.num_test_records))
        if len(answers) != self.num_test_answers:
            raise ValueError(f"{path}:{len(passages)}: {len(answers)} answers, expected {self.num_test_answers}")
