"""A tiny tokenizer and invented records of every evaluation task, in the official form."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from src.models import LeanAlbertConfig, LeanAlbertForPreTraining, load_tokenizer

SPECIAL_TOKENS = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
ALPHABET = (
    LETTERS + LETTERS.upper() + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?@()«»\"'-—\u0301"
)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Pieces of words marked with a leading ▁, pairs as [CLS] first [SEP] second [SEP], as in LeanALBERT."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    alphabet = [*ALPHABET, "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


RUCOS_TEXT = (
    "Мэр Боровска Анна Лисицына открыла мост через Клинку. Прежний мост унесло весной.\n"
    "@highlight\nВ Боровске открыли мост\n@highlight\nЛисицына: по мосту поедут автобусы"
)


def _span(text: str, part: str, occurrence: int = 0) -> dict:
    start = -1
    for _ in range(occurrence + 1):
        start = text.index(part, start + 1)
    return {"start": start, "end": start + len(part)}


RUCOS_ENTITIES = [
    _span(RUCOS_TEXT, "Боровска"),
    _span(RUCOS_TEXT, "Анна Лисицына"),
    _span(RUCOS_TEXT, "Клинку"),
    _span(RUCOS_TEXT, "Боровске"),
    _span(RUCOS_TEXT, "Лисицына", 1),
]


def _labelled(records: list[dict], labels: list) -> list[dict]:
    return [
        {**record, "idx": idx, "label": label} for idx, (record, label) in enumerate(zip(records, labels, strict=True))
    ]


def _entailment(labels: list[str], **extra: str) -> list[dict]:
    pairs = [
        ("Лиса поймала мышь и унесла её в лес.", "Мышь поймали."),
        ("Сын не стал чинить забор.", "Забор починен."),
        ("Говорят, будет дождь.", "Дождь будет сильным."),
    ]
    return _labelled([{"premise": p, "hypothesis": h, **extra} for p, h in pairs[: len(labels)]], labels)


def _muserc(first_passage: int, num_passages: int) -> list[dict]:
    """Passages of two questions with three and two answers; question and answer idx run on over the split."""
    passages = []
    for number in range(num_passages):
        question, answer = 2 * number, 5 * number
        text = f"(1) Пёс {first_passage + number} жил у реки. (2) Он сторожил лодки и любил рыбаков."
        questions = [
            {
                "question": "Что сторожил пёс?",
                "idx": question,
                "answers": [
                    {"idx": answer, "text": "Лодки.", "label": 1},
                    {"idx": answer + 1, "text": "Дом.", "label": 0},
                    {"idx": answer + 2, "text": "Рыбацкие лодки.", "label": 1},
                ],
            },
            {
                "question": "Где жил пёс?",
                "idx": question + 1,
                "answers": [
                    {"idx": answer + 3, "text": "В лесу.", "label": 0},
                    {"idx": answer + 4, "text": "У реки.", "label": 1},
                ],
            },
        ]
        passages.append({"idx": number, "passage": {"text": text, "questions": questions}})
    return passages


def _russe(end_shift: int, labels: list[bool]) -> list[dict]:
    pairs = [
        ("ключ", "Ключ торчал в замке.", "Из-под горы бил холодный ключ", "Ключ", "ключ"),
        ("коса", "Трактор вместо косы", "Девушка заплела косу!", "косы", "косу"),
    ]
    records = []
    for word, first, second, form1, form2 in pairs:
        record = {"word": word, "sentence1": first, "sentence2": second, "gold_sense1": 1, "gold_sense2": 2}
        for number, sentence, form in ((1, first, form1), (2, second, form2)):
            start = sentence.index(form)
            record |= {f"start{number}": start, f"end{number}": start + len(form) + end_shift}
        records.append(record)
    return _labelled(records, labels)


def _rwsd(labels: list[bool]) -> list[dict]:
    text = "Чемодан не влез в шкаф, потому что он был слишком велик."
    targets = [("Чемодан", 0), ("шкаф", 4)]
    records = [
        {
            "text": text,
            "target": {"span1_text": part, "span1_index": index, "span2_text": "он был", "span2_index": 7},
        }
        for part, index in targets
    ]
    return _labelled(records, labels)


def _rucos(num_records: int) -> list[dict]:
    answers = [
        _span(RUCOS_TEXT, "Боровска") | {"text": "Боровска"},
        _span(RUCOS_TEXT, "Боровске") | {"text": "Боровске"},
    ]
    query = "Жители @placeholder ждали нового моста всю зиму."
    return [
        {
            "idx": idx,
            "passage": {"text": RUCOS_TEXT, "entities": RUCOS_ENTITIES},
            "qas": [{"query": query, "answers": answers, "idx": idx}],
        }
        for idx in range(num_records)
    ]


def _danetqa(labels: list[bool]) -> list[dict]:
    return _labelled(
        [{"question": "Правда ли, что кит рыба?", "passage": f"Кит {n} — зверь." * 3} for n in labels], labels
    )


def _parus(labels: list[int]) -> list[dict]:
    pairs = [
        ("Свет погас.", "Перегорела лампа.", "Взошло солнце.", "cause"),
        ("Лёд треснул.", "Рыбак ушёл.", "Снег пошёл.", "effect"),
    ]
    names = ("premise", "choice1", "choice2", "question")
    return _labelled([dict(zip(names, pair, strict=True)) for pair in pairs], labels)


def _unlabelled(records):
    """A copy without "label" and "answers" of RuCoS (but with the answers of MuSeRC)."""
    if isinstance(records, list):
        return [_unlabelled(record) for record in records]
    if isinstance(records, dict):
        drop = {"label", "gold_sense1", "gold_sense2"} | ({"answers"} if "query" in records else set())
        return {name: _unlabelled(value) for name, value in records.items() if name not in drop}
    return records


RCB_EXTRA = {"verb": "говорить", "negation": "no_negation"}
NLI = ["entailment", "not_entailment", "not_entailment"]

OFFICIAL = {
    "RCB": {
        "train": _entailment(["entailment", "contradiction", "neutral"], genre="kp", **RCB_EXTRA),
        "val": _entailment(["contradiction", "entailment", "neutral"], **RCB_EXTRA),
        "test": _unlabelled(_entailment(["neutral"] * 3, **RCB_EXTRA)),
    },
    "TERRa": {"train": _entailment(NLI), "val": _entailment(NLI[:2]), "test": _unlabelled(_entailment(NLI))},
    "LiDiRus": {
        "LiDiRus": [
            {
                "idx": "0",
                "sentence1": "Кот спит.",
                "sentence2": "Кот не спит.",
                "label": "not_entailment",
                "logic": "Negation",
            },
            {
                "idx": "1",
                "sentence1": "Все коты спят.",
                "sentence2": "Кот спит.",
                "label": "entailment",
                "logic": "Universal;Negation",
            },
            {
                "idx": "2",
                "sentence1": "Кот спит.",
                "sentence2": "Кот спит дома.",
                "label": "not_entailment",
                "knowledge": "World knowledge",
            },
        ]
    },
    "DaNetQA": {"train": _danetqa([True, False]), "val": _danetqa([False]), "test": _unlabelled(_danetqa([True]))},
    "PARus": {"train": _parus([0, 1]), "val": _parus([1, 1]), "test": _unlabelled(_parus([0, 0]))},
    "MuSeRC": {"train": _muserc(0, 2), "val": _muserc(10, 1), "test": _unlabelled(_muserc(20, 2))},
    "RUSSE": {
        "train": _russe(1, [False, True]),
        "val": _russe(1, [True, False]),
        "test": _unlabelled(_russe(-1, [True, False])),
    },
    "RWSD": {"train": _rwsd([True, False]), "val": _rwsd([True, False]), "test": _unlabelled(_rwsd([True, False]))},
    "RuCoS": {"train": _rucos(3), "val": _rucos(2), "test": _unlabelled(_rucos(2))},
}
RUCOLA = {
    "in_domain_train.csv": ["0,Кот спит.,1,0,Testelets", '1,"Кот, спать.",0,Syntax,USE8', "2,Пёс лает.,1,0,Rusgram"],
    "in_domain_dev.csv": ["0,Рыба плавает.,1,0,USE5", "1,Рыба плавать.,0,Syntax,USE5"],
    "out_of_domain_dev.csv": ["0,Он спел песню.,1,0,TED", "1,Он спел песня.,0,Morphology,TED", "2,Да.,1,0,Tatoeba"],
    "test.csv": ["0,Кто там?", '1,"Там, где кто?"'],
}


def write_json_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def official() -> dict[str, dict[str, list[dict]]]:
    """The invented records of all Russian SuperGLUE tasks by task and file stem; a test may change its copy."""
    return copy.deepcopy(OFFICIAL)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A directory with the official files of all tasks."""
    directory = tmp_path / "data"
    for task, files in OFFICIAL.items():
        for stem, records in files.items():
            write_json_lines(directory / task / f"{stem}.jsonl", records)
    (directory / "RuCoLA").mkdir()
    for name, rows in RUCOLA.items():
        header = "id,sentence" if name == "test.csv" else "id,sentence,acceptable,error_type,detailed_source"
        (directory / "RuCoLA" / name).write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    texts = [
        json.dumps(record, ensure_ascii=False) for files in OFFICIAL.values() for f in files.values() for record in f
    ]
    return build_tokenizer(texts)


@pytest.fixture
def write_jsonl():
    return write_json_lines


@pytest.fixture(scope="session")
def demo_tokenizer():
    """The tokenizer that lies in the repository."""
    path = Path(__file__).resolve().parents[2] / "demo" / "tokenizer"
    if not path.is_dir():
        pytest.skip(f"no tokenizer at {path}")
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_tokenizer, tmp_path_factory) -> Path:
    """A directory that from_pretrained opens: a random LeanALBERT of two layers, and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("pretrained") / "tiny", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_checkpoint_of_words(demo_tokenizer, tmp_path_factory) -> Path:
    """The same with a tokenizer that knows whole words: long real texts have a fifth of the tokens."""
    return save_tiny_model(tmp_path_factory.mktemp("pretrained") / "words", demo_tokenizer)


def save_tiny_model(directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = LeanAlbertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        embedding_size=16,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        share_large_matrices=1,
    )
    model = LeanAlbertForPreTraining(config)
    torch.nn.init.normal_(model.albert.pooler.bias, std=0.02)  # zeros say that it was not trained
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
