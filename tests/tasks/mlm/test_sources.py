"""Documents of local files and Hugging Face datasets: borders, order, sharing out, resuming, errors."""

import gzip
import itertools
import json
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tasks.mlm import sources
from tasks.mlm.sources import DocumentStream, HubDataset, LocalFiles, derive_seed, iterate_documents, open_source

TEXTS = [f"Документ {number}.\nВторой абзац." for number in range(40)]


def write_text(path, texts=TEXTS):
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def write_json_lines(path, texts=TEXTS):
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_parquet(path, texts=TEXTS):
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    return str(path)


WRITERS = {"a.txt": write_text, "a.jsonl": write_json_lines, "a.jsonl.gz": write_json_lines, "a.parquet": write_parquet}


def read_once(source, *, seed=1, worker=0, num_workers=1, position=None):
    return list(source.read(seed=seed, worker=worker, num_workers=num_workers, position=position))


@pytest.fixture(params=[*WRITERS, "hub", "hub of one shard"])
def any_source(request, tmp_path, monkeypatch):
    """A source of 40 documents in each format, the plain files in several shards."""
    monkeypatch.setattr(sources, "SHARD_BYTES", 300)
    if request.param in WRITERS:
        return open_source(WRITERS[request.param](tmp_path / request.param))
    num_files = 8 if request.param == "hub" else 1
    for number in range(num_files):
        write_parquet(tmp_path / f"part{number}.parquet", TEXTS[number::num_files])
    dataset = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    monkeypatch.setattr(sources, "MAX_SKIPPED_DOCUMENTS", 60)
    return HubDataset("local", dataset)


def test_every_format_gives_each_document_once(any_source):
    assert sorted(text for text, _ in read_once(any_source)) == sorted(TEXTS)


def test_workers_share_out_the_documents(any_source):
    parts = [[text for text, _ in read_once(any_source, worker=worker, num_workers=3)] for worker in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(TEXTS)
    assert all(len(part) > 3 for part in parts)


def test_reading_goes_on_from_a_position(any_source):
    for worker, num_workers in [(0, 1), (1, 2)]:
        documents = read_once(any_source, worker=worker, num_workers=num_workers)
        for done in (1, 7, len(documents) - 1):
            rest = read_once(any_source, worker=worker, num_workers=num_workers, position=documents[done - 1][1])
            assert [text for text, _ in rest] == [text for text, _ in documents[done:]]


def test_seed_decides_where_reading_starts(any_source):
    is_one_small_shard = isinstance(any_source, LocalFiles) and len(any_source.shards) == 1
    starts = {read_once(any_source, seed=seed)[0][0] for seed in range(12)}
    assert len(starts) > 3 or is_one_small_shard  # the compressed file; a large one has its own test
    assert read_once(any_source, seed=5) == read_once(any_source, seed=5)


def test_compressed_file_starts_in_different_places(tmp_path):
    texts = [f"{number} " + derive_text(number) for number in range(12_000)]  # Python 3.12 reads 128 KB at once
    source = open_source(write_json_lines(tmp_path / "large.jsonl.gz", texts))
    starts = {next(source.read(seed=seed, worker=0, num_workers=1, position=None))[0] for seed in range(8)}
    assert len(starts) >= 4
    documents = read_once(source, seed=1)
    assert documents[0][0] != texts[0] and sorted(text for text, _ in documents) == sorted(texts)
    assert read_once(source, seed=1, position=documents[11_989][1]) == documents[11_990:]


def derive_text(number: int) -> str:
    return " ".join(str(derive_seed(number, part)) for part in range(12))  # does not compress well


def test_text_documents_lie_between_blank_lines_at_any_shard_size(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes("\n \nПервый.\r\nЕщё.\n\n\n  \nВторой.\n\t\nТретий.".encode())
    expected = ["Первый.\r\nЕщё.", "Второй.", "Третий."]
    for shard_bytes in range(1, 60):
        monkeypatch.setattr(sources, "SHARD_BYTES", shard_bytes)
        assert list(iterate_documents(str(path))) == expected, shard_bytes


def test_text_without_blank_lines_is_cut_at_a_line_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 100)
    path = tmp_path / "book.txt"
    lines = [f"Строка номер {number}.\n" for number in range(50)]
    path.write_text("".join(lines), encoding="utf-8")
    documents = list(iterate_documents(str(path)))
    assert "\n".join(documents) + "\n" == "".join(lines) and len(documents) > 5


def test_glob_directory_and_list_name_several_files(tmp_path):
    (tmp_path / "deep").mkdir()
    write_text(tmp_path / "1.txt", ["а"])
    write_json_lines(tmp_path / "deep" / "2.jsonl", ["б"])
    assert list(iterate_documents(str(tmp_path / "*.txt"))) == ["а"]
    assert list(iterate_documents(str(tmp_path))) == ["а", "б"]
    assert list(iterate_documents([str(tmp_path / "deep" / "2.jsonl"), str(tmp_path / "1.txt")])) == ["б", "а"]


def make_stream(source, *, buffer_size=10, seed=3, **kwargs):
    return DocumentStream(source, seed=seed, buffer_size=buffer_size, **kwargs)


def test_stream_gives_every_document_once_per_epoch_in_changing_order(any_source):
    stream = make_stream(any_source)
    epochs = [[next(stream) for _ in TEXTS] for _ in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_parts_of_a_corpus_come_in_another_order_in_each_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 300)
    stream = make_stream(open_source(write_text(tmp_path / "a.txt")), buffer_size=1)
    epochs = [[next(stream) for _ in TEXTS] for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_stream_resumes_exactly(any_source):
    stream = make_stream(any_source)
    for num_taken in (0, 1, 9, 33, 47):
        list(itertools.islice(stream, num_taken))
        state = json.loads(json.dumps(stream.state_dict(), default=str))
        resumed = make_stream(any_source)
        resumed.load_state_dict(state)
        assert list(itertools.islice(resumed, 50)) == list(itertools.islice(stream, 50))


def test_stream_ends_for_a_worker_without_documents(tmp_path):
    source = open_source(write_text(tmp_path / "a.txt", ["один", "два"]))
    assert next(make_stream(source, worker=2, num_workers=3), None) is None
    assert next(make_stream(source, worker=1, num_workers=3), None) is not None


def test_block_is_bounded_in_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BLOCK_CHARACTERS", 100)
    stream = make_stream(open_source(write_text(tmp_path / "a.txt")), buffer_size=10_000)
    next(stream)
    assert len(stream._block) < 8


def test_derived_seeds_are_equal_in_every_process():
    code = "from tasks.mlm.sources import derive_seed; print(derive_seed(7, 'shards'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == derive_seed(7, "shards") != derive_seed(8, "shards")


def write_bytes(path, content):
    path.write_bytes(content)
    return path.name


BAD_SOURCES = {
    "missing": (lambda folder: "missing.txt", "missing.txt: no such file"),
    "no match": (lambda folder: "*.jsonl", "*.jsonl: no file matches"),
    "other kind": (lambda folder: write_bytes(folder / "a.csv", b"a"), "a.csv: cannot read this kind of file"),
    "empty": (lambda folder: write_bytes(folder / "a.txt", b""), "a.txt: holds no text"),
    "blank": (lambda folder: write_bytes(folder / "a.jsonl", b'{"text": " "}\n'), "a.jsonl: holds no text"),
    "no field": (
        lambda folder: write_bytes(folder / "a.jsonl", b'{"text": ""}\n\n{"body": "x"}\n'),
        'a.jsonl, line 3: no field "text" (found: body)',
    ),
    "not a string": (lambda folder: write_bytes(folder / "a.jsonl", b'{"text": 5}'), 'line 1: field "text" is not a'),
    "broken json": (lambda folder: write_bytes(folder / "a.jsonl", b'{"text": "'), "a.jsonl, line 1: not valid JSON"),
    "json in gzip": (
        lambda folder: write_bytes(folder / "a.jsonl.gz", gzip.compress(b'\n{"text": ')),
        "a.jsonl.gz, line 2: not valid JSON",
    ),
    "not gzip": (lambda folder: write_bytes(folder / "a.jsonl.gz", b"text"), "a.jsonl.gz: not a complete gzip file"),
    "cut gzip": (
        lambda folder: write_bytes(folder / "a.jsonl.gz", gzip.compress(derive_text(1).encode())[:90]),
        "a.jsonl.gz: not a complete gzip file",
    ),
    "encoding": (lambda folder: write_bytes(folder / "a.txt", "аб\nГод".encode("cp1251")), "not UTF-8 text at byte 0"),
    "not parquet": (lambda folder: write_bytes(folder / "a.parquet", b"PAR"), "a.parquet: not a parquet file"),
    "not a name": (lambda folder: "a/b/c:d", "'a/b/c:d': no such file, and not a Hugging Face dataset"),
    "directory": (lambda folder: str(folder), "the directory holds no text"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source_is_named_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_SOURCES[case]
    with pytest.raises(ValueError) as caught:
        open_source(make(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_without_text_column_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r'a.parquet: no column "text" \(found: body\)'):
        open_source(str(tmp_path / "a.parquet"))


def test_hub_dataset_that_does_not_load_is_one_line(monkeypatch):
    def fail(name, config, **kwargs):
        raise ConnectionError(f"{name} {config} {kwargs['streaming']} {kwargs['split']}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"^owner/name:config.1: .*\(owner/name config.1 True train\)$"):
        open_source("owner/name:config.1")
