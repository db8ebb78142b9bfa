"""The stream of training instances: form, text kept, order, mixing, growth, workers, resuming, errors."""

import itertools
import json
import math
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from src.models import LeanAlbertConfig, LeanAlbertForPreTraining
from src.models.tokenizer import load_tokenizer, raw_tokenizer
from tasks.mlm import data
from tasks.mlm.data import make_training_dataset, take_chunk, truncate_longest_first
from tasks.mlm.sentences import split_sentences
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

REPOSITORY = Path(__file__).resolve().parents[3]
TOKENIZER_PATH = REPOSITORY / "demo" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER_PATH)


def make_document(number: int, num_sentences: int = 12, kind: str = "тетрадь") -> str:
    words = random.Random(number)
    return " ".join(
        f"Это {kind} {number}, лист {sentence}{' и ещё немного слов о погоде' * words.randrange(3)}."
        for sentence in range(num_sentences)
    )


def write_corpus(path, num_documents: int = 30, **kwargs) -> str:
    path.write_text("\n\n".join(make_document(number, **kwargs) for number in range(num_documents)), encoding="utf-8")
    return str(path)


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_corpus(tmp_path / "corpus.txt")


def take(dataset, count: int) -> list[dict]:
    return list(itertools.islice(iter(dataset), count))


def numbers_in(instances, tokenizer, kind: str = "тетрадь") -> Counter:
    texts = [tokenizer.decode(instance["input_ids"]) for instance in instances]
    return Counter(int(number) for text in texts for number in re.findall(rf"{kind} (\d+), лист", text))


def test_instance_is_what_the_tokenizer_makes_of_a_pair(tokenizer, corpus):
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=64)
    for instance in take(dataset, 100):
        ids, types = instance["input_ids"], instance["token_type_ids"]
        assert all(type(value) is int for value in [*ids, *types, *instance["special_tokens_mask"]])
        expected_mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        assert list(instance["special_tokens_mask"]) == expected_mask
        segments = [
            [token for token, kind in zip(ids, types, strict=True) if kind == segment and token not in (2, 3)]
            for segment in (0, 1)
        ]
        if instance["sentence_order_label"] == -100:
            assert list(ids) == [2, *segments[0], 3] and list(types) == [0] * len(ids)
        else:
            assert list(ids) == [2, *segments[0], 3, *segments[1], 3]
            assert list(types) == [0] * (len(segments[0]) + 2) + [1] * (len(segments[1]) + 1)


@pytest.mark.parametrize("max_length", [8, 33, 128, 512])
def test_instances_fill_the_length_and_never_exceed_it(tokenizer, corpus, max_length):
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=max_length)
    lengths = [len(instance["input_ids"]) for instance in take(dataset, 300)]
    assert max(lengths) <= max_length
    assert max(lengths) > 0.85 * min(max_length, 200)


def test_order_label_tells_whether_the_halves_are_swapped(tokenizer, corpus):
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=64)
    labels = Counter()
    for instance in take(dataset, 1000):
        text = tokenizer.decode(instance["input_ids"])
        first, second, *_ = [list(map(int, re.findall(r"лист (\d+)", half))) for half in text.split("[SEP]")]
        labels[instance["sentence_order_label"]] += 1
        if instance["sentence_order_label"] == -100:
            assert not second
        elif first and second:
            assert (first[0] > second[0]) == (instance["sentence_order_label"] == 1)
    assert 0.45 < labels[1] / (labels[0] + labels[1]) < 0.55


@pytest.mark.parametrize("pack", [False, True])
def test_without_sentence_order_an_instance_is_one_stretch_of_a_text(tokenizer, corpus, pack):
    options = {"sources": [corpus], "shuffle_seed": 0, "max_sequence_length": 64, "sentence_order": False}
    items = take(make_training_dataset(tokenizer, pack_sequences=pack, **options), 200)
    for item in items:
        ids, labels = list(item["input_ids"]), item["sentence_order_label"]
        assert set(item["token_type_ids"]) == {0} and len(ids) <= 64
        assert set(labels if pack else [labels]) == {-100}
        for text in tokenizer.decode(ids).split("[CLS]")[1:]:
            assert text.count("[SEP]") == 1
            sheets = list(map(int, re.findall(r"лист (\d+)", text)))
            assert sheets == list(range(sheets[0], sheets[0] + len(sheets))) if sheets else True, "in the text's order"
    if not pack:
        assert statistics.mean(len(item["input_ids"]) for item in items) > 50


def test_document_of_one_sentence_is_kept_without_order(tokenizer, tmp_path):
    source = write_corpus(tmp_path / "a.txt", num_sentences=1)
    instances = take(make_training_dataset(tokenizer, sources=[source], shuffle_seed=0), 300)
    assert {instance["sentence_order_label"] for instance in instances} == {-100}
    assert len(numbers_in(instances, tokenizer)) == 30


@pytest.mark.parametrize("max_length", [16, 64, 256, 512, 2048])
def test_every_token_of_the_text_comes_once_but_one_percent(tokenizer, tmp_path, monkeypatch, max_length):
    source = write_corpus(tmp_path / "a.txt", num_documents=64, num_sentences=40)
    monkeypatch.setattr(data, "NUM_OPEN_DOCUMENTS", 1)
    raw = raw_tokenizer(tokenizer)
    texts = [sentence for number in range(64) for sentence in split_sentences(make_document(number, 40))]
    expected = Counter(token for text in texts for token in raw.encode(text, add_special_tokens=False).ids)
    dataset = make_training_dataset(
        tokenizer, sources=[source], shuffle_seed=0, max_sequence_length=max_length, preprocessing_batch_size=1
    )
    seen, num_left = Counter(), sum(expected.values())
    for instance in dataset:
        tokens = [token for token in instance["input_ids"] if token not in (2, 3)]
        seen.update(tokens)
        num_left = sum(expected.values()) - dataset._stream.num_tokens
        if num_left <= 0:
            break
    assert num_left == 0 and not seen - expected
    assert sum((expected - seen).values()) <= 0.01 * sum(expected.values())
    assert dataset.discarded_share() == sum((expected - seen).values()) / sum(expected.values())


def test_take_chunk_keeps_what_does_not_fit_for_the_next():
    starts_word = [True] * 100
    document = [[5] * 3, [4] * 60, [3] * 30, [2] * 10, [1] * 10]  # the next sentence is the last item
    assert take_chunk(document, 50, starts_word) == [[1] * 10, [2] * 10, [3] * 30]
    assert take_chunk(document, 50, starts_word) == [[4] * 50]
    assert take_chunk(document, 50, starts_word) == [[4] * 10, [5] * 3]
    assert document == []


def test_take_chunk_cuts_long_sentences_between_words():
    starts_word = [token % 4 == 0 for token in range(100)]
    document = [list(range(1, 91))]
    chunks = []
    while document:
        chunks += take_chunk(document, 30, starts_word)
    assert list(itertools.chain(*chunks)) == list(range(1, 91))
    assert [chunk[0] for chunk in chunks] == [1, 28, 56, 84]


def test_truncation_follows_the_tokenizers_library(tokenizer):
    raw = raw_tokenizer(tokenizer)
    word = "слово "
    for first, second, kept in itertools.product((1, 2, 5, 6, 11), (1, 3, 6, 12), (2, 5, 7, 8, 30)):
        pieces = len(raw.encode(word, add_special_tokens=False).ids)
        assert pieces == 1
        raw.enable_truncation(kept, strategy="longest_first")
        pair = raw.encode(word * first, word * second, add_special_tokens=False)
        lengths = (pair.sequence_ids.count(0), pair.sequence_ids.count(1))
        if first + second <= kept:
            assert lengths == (first, second)
        assert tuple(map(len, truncate_longest_first([7] * first, [7] * second, kept))) == lengths


def test_stream_depends_on_the_seed_alone(tokenizer, corpus):
    def make(seed):
        return make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=seed, max_sequence_length=64)

    dataset = make(7)
    assert take(dataset, 50) == take(dataset, 50) == take(make(7), 50)
    assert take(make(8), 50) != take(make(7), 50)
    assert take(make(None), 50) != take(make(None), 50)


def test_stream_is_equal_in_another_process(tokenizer, corpus):
    code = f"""
import hashlib, itertools, json
from src.models.tokenizer import load_tokenizer
from tasks.mlm.data import make_training_dataset
dataset = make_training_dataset(load_tokenizer({str(TOKENIZER_PATH)!r}), sources=[{corpus!r}], shuffle_seed=7)
print(json.dumps(list(itertools.islice(dataset, 20)), default=list))
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    expected = take(make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=7), 20)
    assert json.loads(printed) == json.loads(json.dumps(expected, default=list))


def test_trainers_with_different_seeds_begin_with_different_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.mlm.text_files.SHARD_BYTES", 3000)
    source = write_corpus(tmp_path / "a.txt", num_documents=300)
    starts = []
    for seed in range(3):
        dataset = make_training_dataset(tokenizer, sources=[source], shuffle_seed=seed, shuffle_buffer_size=8)
        starts.append(set(numbers_in(take(dataset, 40), tokenizer)))
    assert all(len(one & other) < 0.6 * len(one) for one, other in itertools.combinations(starts, 2))


def test_neighbours_come_from_different_documents(tokenizer, corpus):
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=32)
    main = [numbers_in([instance], tokenizer).most_common(1) for instance in take(dataset, 400)]
    main = [found[0][0] for found in main if found]
    assert sum(one == other for one, other in itertools.pairwise(main)) < 0.15 * len(main)


def test_sources_are_mixed_by_weights(tokenizer, tmp_path):
    rare = write_corpus(tmp_path / "rare.txt", kind="книга")
    common = write_corpus(tmp_path / "common.txt", num_documents=5, num_sentences=3, kind="газета")
    unused = write_corpus(tmp_path / "unused.txt", kind="тетрадь")
    dataset = make_training_dataset(
        tokenizer, sources=[rare, common, unused], weights=[1, 3, 0], shuffle_seed=0, max_sequence_length=512
    )
    instances = take(dataset, 1000)
    counts = [sum(bool(numbers_in([each], tokenizer, kind)) for each in instances) for kind in ("книга", "газета")]
    assert 0.2 < counts[0] / sum(counts) < 0.3 and sum(counts) > 950


def test_maximum_length_grows_while_the_stream_is_read(tokenizer, corpus):
    length = multiprocessing.Value("i", 32)
    iterator = iter(make_training_dataset(tokenizer, sources=[corpus], max_sequence_length=length, shuffle_seed=0))
    before = [len(next(iterator)["input_ids"]) for _ in range(50)]
    length.value = 96
    after = [len(next(iterator)["input_ids"]) for _ in range(20)]
    assert max(before) <= 32 < 80 < max(after) <= 96


def test_workers_see_different_documents(tokenizer, corpus):
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=64)
    loader = DataLoader(dataset, batch_size=1, collate_fn=lambda batch: batch[0], num_workers=2)
    instances = list(itertools.islice(loader, 240))
    seen = [set(numbers_in(instances[worker::2], tokenizer)) for worker in range(2)]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 30


def test_worker_without_documents_leaves_the_work_to_the_others(tokenizer, tmp_path):
    source = write_corpus(tmp_path / "one.txt", num_documents=1)
    dataset = make_training_dataset(tokenizer, sources=[source], shuffle_seed=0, max_sequence_length=64)
    loader = DataLoader(dataset, batch_size=4, collate_fn=lambda batch: batch, num_workers=2)
    assert len(list(itertools.islice(loader, 20))) == 20


@pytest.mark.parametrize("flags", [{}, {"batch_size": 8}, {"pack_sequences": True}])
@pytest.mark.parametrize("num_done", [0, 1, 133])
def test_loaded_state_continues_with_the_same_instances(tokenizer, tmp_path, corpus, flags, num_done):
    length = multiprocessing.Value("i", 32)
    other = write_corpus(tmp_path / "other.txt", num_documents=9, num_sentences=300, kind="книга")

    def make(seed):
        return make_training_dataset(
            tokenizer,
            sources=[corpus, other],
            weights=[2, 1],
            shuffle_seed=seed,
            shuffle_buffer_size=7,
            max_sequence_length=length,
            **flags,
        )

    dataset = make(1)
    iterator = iter(dataset)
    list(itertools.islice(iterator, num_done))
    length.value = 48
    list(itertools.islice(iterator, num_done))
    torch.save(dataset.state_dict(), tmp_path / "state.pt")
    expected = list(itertools.islice(iterator, 300))
    resumed = make(2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    if num_done == 0:
        length.value = 48
    assert take(resumed, 300) == expected


def test_state_continues_batches_of_a_data_loader(tokenizer, corpus):
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=1, max_sequence_length=64, batch_size=4)
    batches = iter(DataLoader(dataset, batch_size=4, collate_fn=list))
    list(itertools.islice(batches, 21))
    state = dataset.state_dict()
    expected = list(itertools.islice(batches, 30))
    dataset.load_state_dict(state)
    assert list(itertools.islice(DataLoader(dataset, batch_size=4, collate_fn=list), 30)) == expected


def test_state_of_other_sources_is_refused(tokenizer, corpus):
    state = make_training_dataset(tokenizer, sources=[corpus]).state_dict()
    with pytest.raises(ValueError, match="was saved for sources"):
        make_training_dataset(tokenizer).load_state_dict(state)


def padding_share(dataset, *, batch_size, num_batches, multiple=1):
    real, positions = 0, 0
    iterator = iter(dataset)
    for _ in range(num_batches):
        lengths = [len(instance["input_ids"]) for instance in itertools.islice(iterator, batch_size)]
        real, positions = real + sum(lengths), positions + -(-max(lengths) // multiple) * multiple * len(lengths)
    return 1 - real / positions


def test_batches_of_similar_lengths_pad_little(tokenizer):
    shares = [
        padding_share(
            make_training_dataset(tokenizer, shuffle_seed=0, max_sequence_length=512, batch_size=batch_size),
            batch_size=16,
            num_batches=30,
        )
        for batch_size in (16, None)
    ]
    assert shares[0] <= 0.05 and shares[0] < shares[1] / 2


def test_batches_of_similar_lengths_hold_the_same_text(tokenizer, corpus):
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=64, batch_size=8)
    found = numbers_in(take(dataset, 4000), tokenizer)
    assert len(found) == 30 and max(found.values()) < 1.5 * min(found.values())


def write_short_documents(path, num_documents: int) -> str:
    """Documents like those of the web: log-normal lengths, the median 1,200 characters, the mean 1.6 times as long."""
    generator, words = random.Random(0), [f"{word}{end}" for word in make_document(0, 60).split() for end in ("", "ом")]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_documents):
            num_sentences = max(1, round(generator.lognormvariate(math.log(1200 / 83), 1.0)))
            for _ in range(num_sentences):
                file.write(
                    " ".join(generator.choices(words, k=generator.randint(5, 25))).capitalize().strip(".") + ". "
                )
            file.write("\n\n")
    return str(path)


@pytest.mark.parametrize("max_length, limit", [(256, 0.04), (512, 0.04), (2048, 0.10)])
def test_short_documents_pad_and_discard_little(tokenizer, tmp_path, max_length, limit):
    source = write_short_documents(tmp_path / "a.txt", 1500)
    sizes = [len(text) for text in Path(source).read_text(encoding="utf-8").split("\n\n")]
    assert 1100 < statistics.median(sizes) < 1300
    dataset = make_training_dataset(
        tokenizer, sources=[source], shuffle_seed=0, max_sequence_length=max_length, batch_size=32
    )
    assert padding_share(dataset, batch_size=32, num_batches=60) <= limit
    assert dataset.discarded_share() <= 0.01


@pytest.mark.parametrize("multiple", [1, 128])
def test_real_text_pads_and_discards_little(tokenizer, shared_data_dir, multiple):
    source = str(shared_data_dir / "corpus_ru" / "valid.jsonl.gz")
    dataset = make_training_dataset(tokenizer, sources=[source], shuffle_seed=0, max_sequence_length=512, batch_size=16)
    assert padding_share(dataset, batch_size=16, num_batches=40, multiple=multiple) <= 0.05
    assert 0 < dataset.discarded_share() <= 0.01


def test_default_source_is_the_bundled_text(tokenizer):
    instance = take(make_training_dataset(tokenizer, shuffle_seed=0), 1)[0]
    assert len(instance["input_ids"]) > 50 and 1 not in instance["input_ids"]


def test_snippet_of_the_guide_runs(tokenizer):
    dataset = make_training_dataset(tokenizer, max_sequence_length=128)
    collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=128)
    loader = DataLoader(dataset, collate_fn=collator, batch_size=4)
    rows = list(itertools.islice(loader, 11))
    ids = rows[0]["input_ids"][1]
    rate = (ids == 4).data.numpy().sum() / (ids != 0).data.numpy().sum()
    assert 0 < rate < 0.2 and ids.shape == (128,)
    assert "[MASK]" in [tokenizer.decode([token]) for token in ids.data.numpy()]


def test_padding_of_the_callers_tokenizer_does_not_matter(corpus):
    tokenizer = load_tokenizer(TOKENIZER_PATH)
    expected = take(make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0), 5)
    tokenizer(["текст"], padding="max_length", truncation=True, max_length=16)
    dataset = make_training_dataset(tokenizer, sources=[corpus], shuffle_seed=0)
    assert take(dataset, 5) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": [1, 2]}, "2 dataset weights for 1 dataset sources"),
        ({"weights": [-1]}, "none may be negative"),
        ({"weights": [0]}, "not all zero"),
        ({"weights": [float("nan")]}, "none may be negative"),
        ({"sources": []}, "no dataset sources"),
        ({"sources": ["missing.txt"]}, "missing.txt: no such file"),
        ({"max_sequence_length": 7}, "max_sequence_length 7 is below 8"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size is 0"),
        ({"preprocessing_batch_size": 0}, "preprocessing_batch_size is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_unfit_arguments_are_named(tokenizer, corpus, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_training_dataset(tokenizer, **{"sources": [corpus]} | arguments)


def test_tokenizer_without_mask_token_is_named():
    tokenizer = load_tokenizer(TOKENIZER_PATH)
    tokenizer.mask_token = None
    for make in (make_training_dataset, DataCollatorForWholeWordMask):
        with pytest.raises(ValueError, match="no mask_token"):
            make(tokenizer)


def test_text_that_tokenises_to_nothing_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "split_sentences", lambda document: [])
    source = write_corpus(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a.txt: no text is left after tokenisation"):
        take(make_training_dataset(tokenizer, sources=[source]), 1)


def test_sentences_end_at_line_breaks_and_not_inside_speech():
    document = "Он жил на ул. Ленина, д. 5, и т. д.\n«Пойдём!» — сказал А. С. Петров. Да? Нет…\n\nзаголовок\n конец"
    assert split_sentences(document) == [
        "Он жил на ул. Ленина, д. 5, и т. д.",
        "«Пойдём!» — сказал А. С. Петров.",
        "Да?",
        "Нет…",
        "заголовок",
        "конец",
    ]


@pytest.mark.parametrize("position_embedding_type", ["rotary", "absolute"])
@pytest.mark.parametrize("sparse", [False, True])
def test_packed_rows_have_the_losses_of_their_instances(tokenizer, tmp_path, position_embedding_type, sparse):
    source = write_corpus(tmp_path / "a.txt", num_sentences=3)
    dataset = make_training_dataset(
        tokenizer, sources=[source], shuffle_seed=0, max_sequence_length=256, pack_sequences=True
    )
    rows = list(itertools.islice(dataset, 4))
    packed = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=64, seed=0)(rows)
    unpacked = DataCollatorForWholeWordMask(tokenizer, seed=0)(unpack(rows))
    config = LeanAlbertConfig(
        **{"vocab_size": 4000, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2},
        position_embedding_type=position_embedding_type,
    )
    config.sparse_prediction = sparse
    torch.manual_seed(0)
    model = LeanAlbertForPreTraining(config).eval()
    losses, gradients = [], []
    for batch in (packed, unpacked):
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        losses.append((outputs.mlm_loss, outputs.sop_loss))
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert 2 * len(packed["input_ids"]) < len(unpacked["input_ids"]) == len(packed["sentence_order_label"])
    assert torch.equal(packed["sentence_order_label"], unpacked["sentence_order_label"])
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)


def unpack(rows) -> list[dict]:
    instances = []
    for row in rows:
        ends = list(itertools.accumulate(row["instance_lengths"], initial=0))
        assert ends[-1] == len(row["input_ids"])
        for label, (begin, end) in zip(row["sentence_order_label"], itertools.pairwise(ends), strict=True):
            parts = {name: row[name][begin:end] for name in ("input_ids", "token_type_ids", "special_tokens_mask")}
            instances.append(parts | {"sentence_order_label": label})
    return instances


def test_packed_rows_hold_every_token_once(tokenizer, corpus):
    dataset = make_training_dataset(
        tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=64, pack_sequences=True
    )
    rows = take(dataset, 200)
    num_tokens = sum(row["special_tokens_mask"].count(0) for row in rows) + sum(map(len, dataset._stream.pool))
    assert num_tokens == dataset._stream.num_tokens - dataset._stream.num_discarded_tokens
    assert max(len(row["input_ids"]) for row in rows) <= 64


@pytest.mark.parametrize("max_length", [256, 512, 2048])
def test_packed_rows_pad_next_to_nothing(tokenizer, tmp_path, max_length):
    source = write_short_documents(tmp_path / "a.txt", 1500)
    dataset = make_training_dataset(
        tokenizer, sources=[source], shuffle_seed=0, max_sequence_length=max_length, pack_sequences=True
    )
    rows = take(dataset, 200)
    assert 1 - sum(len(row["input_ids"]) for row in rows) / (len(rows) * max_length) <= 0.01
    assert dataset.discarded_share() <= 0.01


def test_packed_rows_grow_with_the_maximum_length(tokenizer, corpus):
    length = multiprocessing.Value("i", 64)
    dataset = make_training_dataset(
        tokenizer, sources=[corpus], max_sequence_length=length, shuffle_seed=0, pack_sequences=True
    )
    iterator = iter(dataset)
    assert all(55 < len(next(iterator)["input_ids"]) <= 64 for _ in range(20))
    length.value = 128
    assert all(110 < len(next(iterator)["input_ids"]) <= 128 for _ in range(20))


def test_packed_rows_come_from_workers(tokenizer, corpus):
    dataset = make_training_dataset(
        tokenizer, sources=[corpus], shuffle_seed=0, max_sequence_length=128, pack_sequences=True
    )
    collator = DataCollatorForWholeWordMask(tokenizer, seed=0)
    for batch in itertools.islice(DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=2), 6):
        assert len(batch["sentence_order_label"]) == batch["instance_index"].max() >= 2
        assert torch.equal(batch["instance_index"] > 0, batch["attention_mask"] > 0)
