"""Documents of local files and Hugging Face datasets: borders, order, sharing out, resuming, errors."""

import functools
import gzip
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from tasks.mlm import hub_text, sources, text_errors, text_files
from tasks.mlm.hub_text import HubDataset
from tasks.mlm.seeds import derive_seed
from tasks.mlm.sources import DocumentStream, iterate_documents, open_source
from tasks.mlm.text_files import LocalFiles

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
    monkeypatch.setattr(text_files, "SHARD_BYTES", 300)
    if request.param in WRITERS:
        return open_source(WRITERS[request.param](tmp_path / request.param))
    num_files = 8 if request.param == "hub" else 1
    for number in range(num_files):
        write_parquet(tmp_path / f"part{number}.parquet", TEXTS[number::num_files])
    dataset = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    monkeypatch.setattr(hub_text, "MAX_SKIPPED_DOCUMENTS", 60)
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
        monkeypatch.setattr(text_files, "SHARD_BYTES", shard_bytes)
        assert list(iterate_documents(str(path))) == expected, shard_bytes


def test_text_without_blank_lines_is_cut_at_a_line_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 100)
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
    monkeypatch.setattr(text_files, "SHARD_BYTES", 300)
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
        raise ConnectionError(f"{name} {config}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(ValueError, match=r"^owner/name:config.1: .*\(owner/name config.1\); look at [^\n]*$"):
        open_source("owner/name:config.1")


def test_hub_dataset_at_a_fixed_commit_is_asked_for_that_and_is_no_path(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise ConnectionError(f"{arguments} {options['revision']}")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(ValueError, match=rf"\('owner/name', 'ru'\) {commit}"):
        open_source(f"owner/name:ru@{commit}")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ValueError, match="there is a local owner/name here, not that commit"):
        open_source(f"owner/name:ru@{commit}")


HOME = f"hf://datasets/owner/name@{'0' * 40}"


@pytest.mark.parametrize(
    "file",
    [
        "/home/ivan/letters.txt",
        "zip://letters.txt::/home/ivan/letters.zip",
        "https://example.org/text.txt",
        "hf://datasets/other/name@main/text.txt",
        HOME[:-1] + "1/text.txt",
    ],
)
def test_hub_dataset_at_a_fixed_commit_is_nothing_but_its_own_files(monkeypatch, file):
    """What it consists of is said by its page, which a stranger may have written."""

    def load(*arguments, data_files, **options):
        stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "one"}]))
        return SimpleNamespace(config=SimpleNamespace(data_files=data_files), as_streaming_dataset=lambda split: stream)

    own = {"train": [f"{HOME}/a.txt", f"zip://b.txt::{HOME}/b.zip"]}
    monkeypatch.setattr(datasets, "load_dataset_builder", functools.partial(load, data_files=own))
    open_source(f"owner/name@{'0' * 40}")
    for data_files in ({**own, "test": [file]}, None):
        monkeypatch.setattr(datasets, "load_dataset_builder", functools.partial(load, data_files=data_files))
        with pytest.raises(ValueError, match=r"(a file that is not its own: '|are not to be had)[^\n]*$"):
            open_source(f"owner/name@{'0' * 40}")


# -- documents and files that cannot be read ---------------------------------------------------------------------------


def test_text_without_blank_lines_is_not_searched_for_one_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "SHARD_BYTES", 2000)
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 500)
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"Строка номер {number}.\n" for number in range(2000)), encoding="utf-8")
    source = open_source(str(path))
    assert "\n".join(iterate_documents(str(path))) + "\n" == path.read_text(encoding="utf-8")
    starts = {next(source.read(seed=seed, worker=0, num_workers=1, position=None))[0] for seed in range(20)}
    assert len(starts) > 10
    num_bytes = []
    monkeypatch.setattr(sources, "open", functools.partial(Counted, num_bytes), raising=False)
    shard = source.shards[3]
    list(text_files.read_text_documents(shard, 0.0))
    assert sum(num_bytes) < 3 * 2000


class Counted:
    """A file that notes how many bytes are read from it."""

    def __init__(self, num_bytes, path, mode):
        self.file, self.num_bytes = Path(path).open(mode), num_bytes  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def seek(self, *arguments):
        return self.file.seek(*arguments)

    def read(self, *arguments):
        return self.noted(self.file.read(*arguments))

    def readline(self, *arguments):
        return self.noted(self.file.readline(*arguments))

    def __iter__(self):
        return iter(self.readline, b"")

    def noted(self, data):
        self.num_bytes.append(len(data))
        return data


@pytest.mark.parametrize("blank", [" ", ""])
def test_text_of_one_gigantic_line_is_cut_between_words_or_at_least_characters(tmp_path, monkeypatch, blank):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 160)
    path = tmp_path / "line.txt"
    text = blank.join(f"слово{number}" for number in range(500))
    path.write_text(text, encoding="utf-8")
    for shard_bytes in (100, 237, 1000, 10**6):
        monkeypatch.setattr(text_files, "SHARD_BYTES", shard_bytes)
        documents = list(iterate_documents(str(path)))
        assert blank.join(documents) == text
        assert max(len(document.encode()) for document in documents) <= 320


ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp1251", "koi8-r"]
PROSE = [f"Утром мы пошли в лес за грибами, дом {number}. Ёлка ещё зелёная." for number in range(60)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_text_in_another_encoding_is_refused_when_it_is_opened(tmp_path, encoding, name):
    write_text(tmp_path / "0.txt")
    path = tmp_path / name
    if path.suffix == ".txt":
        content = "\n\n".join(PROSE)
    else:
        content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in PROSE)
    content = content.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(ValueError, match=f"{name}: .*iconv") as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_lines_that_end_in_carriage_returns_alone_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"text": "a"}\r\r{"text": "b"}\r\r{"text": "c"}\r')
    with pytest.raises(ValueError, match=f"{name}: lines end in a carriage return alone"):
        open_source(str(path))


def json_text(value) -> bytes:
    return json.dumps({"text": value}).encode()


BAD_LINES = {
    "another encoding": ('{"text": "Старая кодировка."}'.encode("cp1251"), "not UTF-8 text"),
    "broken": (b'{"text": "', "not valid JSON"),
    "deep": (b'{"text": ' + b"[" * 10**5, "nested too deeply"),
    "null": (json_text(None), 'field "text" is not a string but null'),
    "number": (json_text(5), 'field "text" is not a string but int'),
    "list": (json_text(["a"]), 'field "text" is not a string but list'),
    "no field": (b'{"body": "x"}', 'no field "text" (found: body)'),
    "an array": (b"[1, 2]", 'no field "text" (found: list)'),
    "zeros": (b"\0" * 90, "not valid JSON"),
    "long": (json_text("я" * 50_000), "or more; JSON Lines are one document a line"),
    "control characters": (json_text("У\0т\4р\1о\0"), "control characters"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_line_amid_good_ones_is_left_out_and_said(tmp_path, monkeypatch, caplog, case, name):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 200_000)
    content, reason = BAD_LINES[case]
    path = tmp_path / name
    good = write_json_lines(tmp_path / "good.jsonl")
    lines = Path(good).read_bytes().splitlines(keepends=True)
    lines[20:20] = [content + b"\n"]
    path.write_bytes(gzip.compress(b"".join(lines)) if path.suffix == ".gz" else b"".join(lines))
    source = open_source(str(path))
    for _ in range(2):  # what is said once is not said again in the next pass
        assert sorted(text for text, _ in read_once(source)) == sorted(TEXTS)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and f"{name}, line 21: " in messages[0] and reason in messages[0]
    assert "left out" in messages[0] and "\n" not in messages[0]


@pytest.mark.parametrize("content", ["Старая кодировка.".encode("cp1251"), "Утром мы.".encode("utf-16-le")])
def test_bad_document_amid_good_ones_is_left_out_and_said(tmp_path, caplog, content):
    path = tmp_path / "a.txt"
    before = "\n\n".join(PROSE[:30]).encode() + b"\n\n"
    path.write_bytes(before + content + b"\n\n" + "\n\n".join(PROSE[30:]).encode())
    assert list(iterate_documents(str(path))) == PROSE
    assert len(caplog.records) == 1 and f"a.txt: not UTF-8 text at byte {len(before)};" in caplog.text.replace(
        f"from byte {len(before)} on: control characters", f"not UTF-8 text at byte {len(before)};"
    )


def test_documents_left_out_are_counted_in_tenfold_steps_and_too_many_are_an_error(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    good, bad = json_text("текст") + b"\n", json_text(None) + b"\n"
    path.write_bytes((good * 2 + bad) * 200)
    assert len(list(iterate_documents(str(path)))) == 400
    counts = [record.getMessage() for record in caplog.records]
    assert len(counts) == 3 and "a.jsonl: 10 documents" in counts[1] and "a.jsonl: 100 documents" in counts[2]
    path.write_bytes((good + bad * 2) * 200)
    with pytest.raises(
        text_errors.TextError, match=r"a\.jsonl: 100 of 151 documents cannot be read; .*line 150: field"
    ):
        list(iterate_documents(str(path)))


def test_halves_of_characters_are_replaced(tmp_path):
    text = "Смайлик обрезан \ud83d тут, в середине. Цел \ud83d\ude00 там."
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    assert list(iterate_documents(str(tmp_path))) == ["Смайлик обрезан \ufffd тут, в середине. Цел 😀 там."] * 2


def test_separators_of_unicode_stay_within_a_line(tmp_path):
    texts = [f"Кот{mark}спит.{mark}{mark}Да." for mark in "\u2028\u2029\x85\x0b\x0c\x1c\x1e"]
    assert list(iterate_documents(write_json_lines(tmp_path / "a.jsonl", texts))) == texts
    assert len(list(iterate_documents(write_text(tmp_path / "a.txt", texts)))) == len(texts)


def test_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz"):
        path = tmp_path / name
        content = "\ufeff".encode() + (b"text" if name == "a.txt" else json_text("text"))
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        assert list(iterate_documents(str(path))) == ["text"]


def test_files_that_are_hidden_or_made_by_macos_are_left_out_of_a_directory(tmp_path, monkeypatch):
    folder = tmp_path / ".hidden" / "d"
    for name in (".ipynb_checkpoints/a-checkpoint.txt", ".git/x.txt", "__MACOSX/a.txt", "._a.txt", "b/.b.txt", "a.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("один")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "B.TXT").write_text("два")
    assert list(iterate_documents(str(folder))) == ["два", "один"]
    monkeypatch.chdir(folder)
    assert list(iterate_documents(".")) == ["два", "один"]


def test_files_of_other_kinds_in_a_directory_are_said(tmp_path, caplog):
    write_text(tmp_path / "a.txt", ["один"])
    write_bytes(tmp_path / "b.jsonl.zst", b"\x28\xb5\x2f\xfd")
    assert list(iterate_documents(str(tmp_path))) == ["один"]
    assert "1 files of other kinds are left out (b.jsonl.zst)" in caplog.text


def damage(path, begin, end):
    content = bytearray(path.read_bytes())
    for index in range(begin, end):
        content[index] ^= 0x5A
    path.write_bytes(content)


def test_cut_gzip_is_an_error_with_its_place_where_it_ends(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_json_lines(path, [f"{number} " + derive_text(number) for number in range(2000)])
    path.write_bytes(path.read_bytes()[:-50_000])
    source, documents = open_source(str(path)), []
    with pytest.raises(text_errors.TextError, match=r"a\.jsonl\.gz after line \d+: not a complete gzip file"):
        for text, _ in source.read(seed=None, worker=0, num_workers=1, position=None):
            documents.append(text)
    assert len(documents) > 100


def test_damaged_parquet_is_an_error_with_its_place(tmp_path):
    table = pyarrow.table({"text": [f"{number} " + derive_text(number) for number in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", row_group_size=500)
    size = (tmp_path / "a.parquet").stat().st_size
    damage(tmp_path / "a.parquet", size // 2, size // 2 + 100)
    with pytest.raises(text_errors.TextError, match=r"a\.parquet, row \d+ of row group [12]: the file is damaged"):
        list(iterate_documents(str(tmp_path)))


def test_silent_damage_of_parquet_is_found_by_its_checksums(tmp_path):
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True
    )
    damage(tmp_path / "a.parquet", 300, 302)
    with pytest.raises(text_errors.TextError, match=r"a\.parquet, row 0 of row group 0: the file is damaged"):
        list(iterate_documents(str(tmp_path)))


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.string(), pyarrow.dictionary(pyarrow.int32(), "string")])
def test_parquet_values_that_are_no_text_are_left_out_and_said(tmp_path, caplog, kind):
    values = [*(text.encode() for text in TEXTS), "Старая.".encode("cp1251"), None, b"\xed\xa0\xbd x"]
    column = pyarrow.array(values, pyarrow.binary())
    if not pyarrow.types.is_binary(kind):
        column = pyarrow.StringArray.from_buffers(len(values), *column.buffers()[1:], column.buffers()[0])
    column = column.dictionary_encode() if pyarrow.types.is_dictionary(kind) else column
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert list(iterate_documents(str(tmp_path))) == [*TEXTS, "\ufffd x"]
    assert "a.parquet, row 40 of row group 0: " in caplog.text and "not UTF-8" in caplog.text
    source = open_source(str(tmp_path))
    read_once(source)
    assert len(source.left_out.places) == 2


def test_file_that_goes_away_is_one_line(tmp_path):
    write_text(tmp_path / "a.txt")
    source = open_source(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(text_errors.TextError, match=r"a\.txt: cannot be read \(No such file"):
        read_once(source)


def raise_text_error(worker):
    raise text_errors.TextError("a.txt: damaged\nhere")


def test_text_error_of_a_data_worker_is_its_one_line(tmp_path):
    loader = torch.utils.data.DataLoader([0], collate_fn=raise_text_error, num_workers=1)
    with pytest.raises(text_errors.TextError) as caught:
        list(loader)
    assert str(caught.value) == "a.txt: damaged here"


# -- a hub that fails --------------------------------------------------------------------------------------------------


class Trouble:
    """What happens to the requests of a stream: errors for each of its documents, taken one by one, then none."""

    errors: dict[str, list[Exception]] = {}


def stream_with_trouble(shards):
    for shard in shards:
        for text in shard:
            if Trouble.errors.get(text):
                raise Trouble.errors[text].pop(0)
            yield {"text": text}


def refused(status):
    request = httpx.Request("GET", "http://hub/datasets/me/texts/resolve/main/0.parquet")
    message = f"(Request ID: Root=1-x)\n\n{status} Error: no.\nCannot access content"
    return HfHubHTTPError(message, response=httpx.Response(status, request=request))


def wrapped(error):
    try:
        raise ConnectionError("Server Disconnected") from error
    except ConnectionError as outer:
        return outer


PASSING = {
    "500": lambda: refused(500),
    "429": lambda: refused(429),
    "broken connection": lambda: httpx.RemoteProtocolError("peer closed connection"),
    "timeout": lambda: httpx.ReadTimeout("timed out"),
    "nobody there": lambda: ConnectionRefusedError(111, "refused"),
    "503 after many attempts": lambda: wrapped(refused(503)),
}
FINAL = {
    "401": (lambda: refused(401), "HTTP 401: 401 Error: no."),
    "403": (lambda: refused(403), "HTTP 403: 403 Error: no."),
    "404": (lambda: refused(404), "HTTP 404: 404 Error: no."),
    "gone": (lambda: FileNotFoundError("0.parquet"), "FileNotFoundError: 0.parquet"),
    "damaged": (lambda: pyarrow.ArrowInvalid("no magic\nbytes"), "ArrowInvalid: no magic"),
    "403 after an attempt": (lambda: wrapped(refused(403)), "HTTP 403: Server Disconnected"),
}


@pytest.fixture(params=[1, 8], ids=["one shard", "eight shards"])
def hub_source(request, monkeypatch):
    monkeypatch.setattr(hub_text.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub_text, "MAX_SKIPPED_DOCUMENTS", 20)
    monkeypatch.setattr(Trouble, "errors", {})
    shards = [TEXTS[number :: request.param] for number in range(request.param)]
    dataset = datasets.IterableDataset.from_generator(stream_with_trouble, gen_kwargs={"shards": shards})
    source = HubDataset("me/texts", dataset)
    source.left_out.opened()
    return source


@pytest.mark.parametrize("kind", PASSING)
def test_hub_in_trouble_is_asked_again_with_one_line_and_nothing_is_lost(hub_source, caplog, kind):
    expected = [read_once(hub_source, worker=worker, num_workers=2) for worker in range(2)]
    first, last = expected[0][0][0], expected[1][-1][0]
    Trouble.errors = {first: [PASSING[kind]() for _ in range(3)]}
    assert [text for text, _ in read_once(hub_source, num_workers=2)] == [text for text, _ in expected[0]]
    Trouble.errors = {last: [PASSING[kind]()]}
    assert [text for text, _ in read_once(hub_source, worker=1, num_workers=2)] == [text for text, _ in expected[1]]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4 and "me/texts: the hub does not answer (" in messages[0]
    assert "answers again" in messages[1] and "\n" not in messages[0]


@pytest.mark.parametrize("kind", FINAL)
def test_hub_that_refuses_is_one_line(hub_source, caplog, kind):
    make, reason = FINAL[kind]
    Trouble.errors = {TEXTS[25]: [make()]}
    with pytest.raises(text_errors.TextError) as caught:
        read_once(hub_source)
    assert reason in str(caught.value) and str(caught.value).startswith("me/texts: ") and not caplog.records


def test_hub_that_never_answers_is_given_up(hub_source, monkeypatch):
    clock = itertools.count(0.0, 50.0)
    monkeypatch.setattr(hub_text.time, "monotonic", lambda: next(clock))
    Trouble.errors = {TEXTS[25]: [refused(500) for _ in range(1000)]}
    with pytest.raises(text_errors.TextError, match=r"has not answered for 6[05]0 s"):
        read_once(hub_source)


def test_documents_of_a_hub_that_are_no_text_are_left_out_and_said(caplog):
    values = [*TEXTS, None, ["a"], "Обрезан \ud83d тут.", "У\0т\4р\1о\0"]
    dataset = FakeStream([{"text": [value]} for value in values])
    source = HubDataset("me/texts", dataset)
    source.left_out.opened()
    texts = [text for text, _ in source.read(seed=None, worker=0, num_workers=1, position=None)]
    assert texts == [*TEXTS, "Обрезан \ufffd тут."]
    assert len(source.left_out.places) == 3 and "me/texts, document 40: field" in caplog.text


class FakeStream:
    """As much of an IterableDataset as is used, with values that no real one could be made of here."""

    features, num_shards = None, 2

    def __init__(self, batches):
        self.batches = batches

    def iter(self, batch_size):
        return iter(self.batches)

    def state_dict(self):
        return {}


def test_configurations_of_a_hub_dataset_are_named(monkeypatch):
    def fail(name, config, **kwargs):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['first', 'second']\nExample: x"
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(ValueError, match=r"^me/two: has several configurations.*: me/two:first, me/two:second$"):
        open_source("me/two")


def test_stream_can_be_opened_in_other_threads(hub_source):
    """The datasets library keeps the connections of each thread, and adds one where a dataset is copied."""
    texts = []
    HfFileSystem()
    first = hub_source.read(seed=1, worker=0, num_workers=1, position=None)
    next(first)
    thread = threading.Thread(target=lambda: texts.extend(read_once(hub_source)))
    thread.start()
    thread.join()
    assert len(texts) == len(TEXTS)
