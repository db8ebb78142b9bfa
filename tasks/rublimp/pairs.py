"""The minimal pairs of RuBLiMP (arXiv 2406.19232): each paradigm is a file of sentences and their ungrammatical twins.

What is read decides nothing about how pairs are scored: columns beyond those needed, and paradigms beyond the published
ones, are welcome.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.finetuning import sources

TASK = "RuBLiMP"
HUB_REPOSITORY = "RussianNLP/rublimp"
DOWNLOAD = "https://github.com/RussianNLP/RuBLiMP/tree/main/datasets"
COLUMNS = ("id", "source_sentence", "target_sentence", "level", "phenomenon")
LEVELS = ("Morphology", "Syntax", "Semantics")
PARADIGMS = (
    "add_new_suffix", "add_verb_prefix", "adposition_government", "anaphor_agreement_gender",
    "anaphor_agreement_number", "change_declension_ending", "change_declension_ending_has_dep",
    "change_duration_aspect", "change_repetition_aspect", "change_verb_conjugation", "change_verb_prefixes_order",
    "clause_subj_predicate_agreement_gender", "clause_subj_predicate_agreement_number",
    "clause_subj_predicate_agreement_person", "conj_verb_tense", "deontic_imperative_aspect", "external_possessor",
    "floating_quantifier_agreement_case", "floating_quantifier_agreement_gender",
    "floating_quantifier_agreement_number", "genitive_subj_predicate_agreement_gender",
    "genitive_subj_predicate_agreement_number", "genitive_subj_predicate_agreement_person",
    "indefinite_pronoun_to_negative", "negative_concord", "negative_pronoun_to_indefinite", "nominalization_case",
    "noun_subj_predicate_agreement_gender", "noun_subj_predicate_agreement_number",
    "noun_subj_predicate_agreement_person", "np_agreement_case", "np_agreement_gender", "np_agreement_number",
    "single_verb_tense", "subj_predicate_agreement_gender_attractor", "subj_predicate_agreement_number_attractor",
    "tense_marker", "transitive_verb", "transitive_verb_iobject", "transitive_verb_object", "transitive_verb_passive",
    "transitive_verb_subject", "verb_acc_object", "verb_gen_object", "verb_ins_object",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A grammatical sentence and its twin."""

    paradigm: str
    id: str
    level: str
    phenomenon: str
    grammatical: str
    ungrammatical: str

    @property
    def texts(self) -> tuple[str, str]:
        return self.grammatical, self.ungrammatical

    @property
    def digest(self) -> str:
        """The same wherever the pair stands in its file, and whatever id it has there."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()[:16]

    @property
    def identity(self) -> tuple[str, str]:
        return self.paradigm, self.digest


def read_pairs(data_dir: Path, *, pairs_each: int) -> list[Pair]:
    """A sample of every paradigm in DATA_DIR/RuBLiMP/PARADIGM.csv, or of the hub's where there is no such folder.

    Raises ValueError with file and line for what is no paradigm.
    """
    directory = sources.find_task_directory(Path(data_dir), TASK)
    if directory is None:
        return [pair for paradigm in PARADIGMS for pair in sample(read_from_hub(paradigm), pairs_each)]
    files = sorted(directory.glob("*.csv")) or sorted(directory.glob("datasets/*.csv"))  # a copy of the repository
    if not files:
        raise ValueError(f"{directory}: holds no PARADIGM.csv; get them from {DOWNLOAD}")
    return [pair for file in files for pair in sample(read_paradigm(file), pairs_each)]


def read_paradigm(path: Path) -> list[Pair]:
    """All pairs of a file; its name is the paradigm's."""
    return make_pairs(path.stem, sources.read_csv(path, COLUMNS, others=True))


def read_from_hub(paradigm: str) -> list[Pair]:
    import datasets

    try:
        rows = datasets.load_dataset(HUB_REPOSITORY, paradigm, split="train")
    except Exception as error:  # the hub client raises its own, httpx's and datasets' errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"could not load {paradigm} from the hub repository {HUB_REPOSITORY} ({reason}); or put the files of "
            f"{DOWNLOAD} into DATA/{TASK} and pass -d DATA"
        ) from error
    return make_pairs(
        paradigm, [(f"{HUB_REPOSITORY}/{paradigm}, row {number}", row) for number, row in enumerate(rows)]
    )


def make_pairs(paradigm: str, rows: Iterable[tuple[str, Mapping]]) -> list[Pair]:
    pairs: list[Pair] = []
    for where, row in rows:
        lacking = [name for name in COLUMNS if not str(row.get(name) or "").strip()]
        if lacking:
            raise ValueError(f"{where}: {lacking[0]} is empty")
        level, phenomenon = str(row["level"]).strip(), str(row["phenomenon"]).strip()
        if pairs and (level, phenomenon) != (pairs[0].level, pairs[0].phenomenon):
            raise ValueError(
                f"{where}: {level}, {phenomenon} in a paradigm that began as {pairs[0].level}, {pairs[0].phenomenon}"
            )
        sentences = row["source_sentence"], row["target_sentence"]
        pairs.append(Pair(paradigm, str(row["id"]), level, phenomenon, *sentences))
    return pairs


def sample(pairs: Sequence[Pair], number: int) -> list[Pair]:
    """So many pairs of a paradigm, the same ones wherever they stand in the file; a larger sample holds a smaller."""
    return sorted(pairs, key=lambda pair: pair.digest)[:number]


def missing_paradigms(pairs: Iterable[Pair]) -> list[str]:
    """The published paradigms of which there is no pair."""
    there = {pair.paradigm for pair in pairs}
    return [paradigm for paradigm in PARADIGMS if paradigm not in there]


def fingerprint(pairs: Iterable[Pair]) -> str:
    """SHA-256 of what is scored and how it is grouped; equal for equal pairs, wherever they were read from."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.paradigm, pair.level, pair.phenomenon, *pair.texts]).encode())
    return digest.hexdigest()
