"""Documents of the training text: local files and streamed Hugging Face datasets, in seeded order.

A source is read in shards (4 MB of a plain file, a row group of a parquet file, a whole compressed file). The order of
the shards depends on the seed, so trainers with different seeds begin in different places of a corpus of any size.
"""

import copy
import glob
import gzip
import hashlib
import json
import logging
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**22
MAX_DOCUMENT_BYTES = 2**20  # a .txt file without blank lines is cut here, at a line end
FIRST_BLOCK_DOCUMENTS = 256  # the shuffle buffer starts small and doubles: training need not wait until it is full
MAX_BLOCK_CHARACTERS = 2**25  # 64 MB of Russian text, whatever the number of documents
MAX_SKIPPED_DOCUMENTS = 10_000  # of a streamed dataset that has but one shard
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?")
DEFAULT_SOURCE = str(Path(__file__).resolve().parents[2] / "demo" / "corpus" / "*.txt")

Record = tuple[int, int, bytes | str]  # number in its shard, offset or line (for error messages), content


def derive_seed(*parts) -> int:
    """A 63-bit seed that is the same in every process (`hash` is not) and differs when any of the parts does."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Shard:
    """Part of a file: byte range of a plain file, one row group of a parquet file, or a whole compressed file."""

    path: str
    start: int = 0
    stop: int = 0


def list_byte_ranges(path: str) -> list[Shard]:
    size = os.path.getsize(path)
    return [Shard(path, start, min(start + SHARD_BYTES, size)) for start in range(0, size, SHARD_BYTES)]


def read_lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the first line that starts in the shard to the end of the file."""
    with open(shard.path, "rb") as file:
        offset = 0
        if shard.start:
            file.seek(shard.start - 1)
            offset = shard.start - 1 + len(file.readline())
        for line in file:
            yield offset, line
            offset += len(line)


def read_text_documents(shard: Shard, start_fraction: float) -> Iterator[Record]:
    """Runs of lines between blank lines. A document belongs to the shard in which the blank line before it starts."""
    number, first_offset, lines, size = 0, 0, [], 0
    begins_here = shard.start == 0
    for offset, line in read_lines(shard):
        is_blank = not line.strip()
        if lines and (is_blank or size >= MAX_DOCUMENT_BYTES):
            yield number, first_offset, b"".join(lines)
            number, lines, size = number + 1, [], 0
        if is_blank:
            if offset >= shard.stop:
                return
            begins_here = True
        elif begins_here:
            first_offset = first_offset if lines else offset
            lines.append(line)
            size += len(line)
    if lines:
        yield number, first_offset, b"".join(lines)


def parse_text(shard: Shard, location: int, record: bytes) -> str:
    try:
        return record.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        offset = location + error.start
        raise ValueError(f"{shard.path}: not UTF-8 text at byte {offset}; convert it (iconv -t UTF-8)") from None


def read_json_lines(shard: Shard, start_fraction: float) -> Iterator[Record]:
    number = 0
    for offset, line in read_lines(shard):
        if offset >= shard.stop:
            return
        if line.strip():
            yield number, offset, line
            number += 1


def count_lines_before(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return file.read(offset).count(b"\n")


def parse_json_line(shard: Shard, location: int, record: bytes) -> str:
    try:
        return parse_json_text(record)
    except ValueError as error:
        raise ValueError(f"{shard.path}, line {count_lines_before(shard.path, location) + 1}: {error}") from None


def parse_json_text(record: bytes) -> str:
    try:
        content = json.loads(record)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; convert it (iconv -t UTF-8)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(content, dict) or "text" not in content:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'no field "text" (found: {found[:80]})')
    if not isinstance(content["text"], str):
        raise ValueError(f'field "text" is not a string but {type(content["text"]).__name__}')
    return content["text"]


def list_whole_file(path: str) -> list[Shard]:
    return [Shard(path, 0, os.path.getsize(path))]


def read_gzip_lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """(bytes of the compressed file read so far, line number from 1, line) of the lines that are not blank."""
    try:
        with open(path, "rb") as compressed, gzip.open(compressed) as file:
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    yield compressed.tell(), line_number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}); download or compress it again") from None


def read_gzip_records(shard: Shard, start_fraction: float) -> Iterator[Record]:
    """All records, from the one at `start_fraction` of the file to the end and then from the beginning to it."""
    num_skipped = 0
    threshold = start_fraction * shard.stop
    for number, (bytes_read, line_number, line) in enumerate(read_gzip_lines(shard.path)):
        if bytes_read < threshold:
            num_skipped += 1
        else:
            yield number, line_number, line
    if num_skipped:
        for number, (_, line_number, line) in enumerate(read_gzip_lines(shard.path)):
            if number == num_skipped:
                return
            yield number, line_number, line


def parse_gzip_line(shard: Shard, location: int, record: bytes) -> str:
    try:
        return parse_json_text(record)
    except ValueError as error:
        raise ValueError(f"{shard.path}, line {location}: {error}") from None


def open_parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    if "text" not in file.schema_arrow.names:
        raise ValueError(f'{path}: no column "text" (found: {", ".join(file.schema_arrow.names)[:80]})')
    return file


def list_row_groups(path: str) -> list[Shard]:
    with open_parquet(path) as file:
        return [Shard(path, group, group + 1) for group in range(file.num_row_groups)]


def read_parquet_records(shard: Shard, start_fraction: float) -> Iterator[Record]:
    number = 0
    with open_parquet(shard.path) as file:
        for batch in file.iter_batches(batch_size=256, row_groups=[shard.start], columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield number, number, text
                number += 1


def parse_parquet_text(shard: Shard, location: int, record: str | None) -> str:
    if record is not None and not isinstance(record, str):
        raise ValueError(f'{shard.path}: column "text" holds {type(record).__name__}, not strings')
    return record or ""


@dataclass(frozen=True)
class FileFormat:
    """How files with one suffix are split into shards, shards read as records, and records turned into text."""

    list_shards: Callable[[str], list[Shard]]
    read: Callable[[Shard, float], Iterator[Record]]
    parse: Callable[[Shard, int, bytes | str], str]


FORMATS = {
    ".txt": FileFormat(list_byte_ranges, read_text_documents, parse_text),
    ".jsonl": FileFormat(list_byte_ranges, read_json_lines, parse_json_line),
    ".jsonl.gz": FileFormat(list_whole_file, read_gzip_records, parse_gzip_line),
    ".parquet": FileFormat(list_row_groups, read_parquet_records, parse_parquet_text),
}


def find_format(path: str) -> FileFormat | None:
    return next((file_format for suffix, file_format in FORMATS.items() if path.endswith(suffix)), None)


class LocalFiles:
    """Documents in local files. `open_reader` gives the documents of one pass, in an order that depends on the seed."""

    def __init__(self, name: str, paths: Sequence[str]):
        self.name = name
        self.shards = [shard for path in paths for shard in find_format(path).list_shards(path)]

    def read(self, *, seed: int | None, worker: int, num_workers: int, position) -> Iterator[tuple[str, list[int]]]:
        """(document, position after it) of one pass, in file order when the seed is None.

        Workers get every num_workers-th document, so together they see each one once. A position is where to go on.
        """
        order = list(range(len(self.shards)))
        if seed is not None:
            random.Random(derive_seed(seed, "shards")).shuffle(order)
        first_shard, num_records_done = position or (0, 0)
        for turn in range(first_shard, len(order)):
            shard, shard_number = self.shards[order[turn]], order[turn]
            file_format = find_format(shard.path)
            start_fraction = 0.0 if seed is None else random.Random(derive_seed(seed, "start", shard_number)).random()
            for count, (number, location, record) in enumerate(file_format.read(shard, start_fraction), 1):
                if count <= num_records_done or (number + shard_number) % num_workers != worker:
                    continue
                text = file_format.parse(shard, location, record)
                if text.strip():
                    yield text, [turn, count]
            num_records_done = 0


class HubDataset:
    """Documents in the column "text" of a Hugging Face dataset's split "train", streamed."""

    def __init__(self, name: str, dataset):
        self.name = name
        self.dataset = dataset
        if dataset.features is not None and "text" not in dataset.features:
            raise ValueError(f'{name}: no column "text" (found: {", ".join(dataset.features)[:80]})')

    def read(self, *, seed: int | None, worker: int, num_workers: int, position) -> Iterator[tuple[str, dict]]:
        """(document, position after it) of one pass, in an order of the dataset's own shards given by the seed.

        A dataset of a single shard begins at one of its first MAX_SKIPPED_DOCUMENTS instead, and wraps around.
        """
        num_skipped = (
            random.Random(seed).randrange(MAX_SKIPPED_DOCUMENTS)
            if seed is not None and self.dataset.num_shards == 1
            else 0
        )
        position = position or {"pass": 0, "number": num_skipped, "dataset": None}
        for current_pass in range(position["pass"], 2 if num_skipped else 1):
            dataset, number = self._open_pass(seed, num_skipped, current_pass)
            if current_pass == position["pass"] and position["dataset"] is not None:
                number = position["number"]
                dataset.load_state_dict(position["dataset"])
            # .iter, not iter(): the latter deals the shards out to DataLoader workers itself and may leave some none
            for batch in dataset.iter(batch_size=1):
                if current_pass and number == num_skipped:
                    return
                if "text" not in batch:
                    raise ValueError(f'{self.name}: no column "text" (found: {", ".join(batch)[:80]})')
                text, number = batch["text"][0], number + 1
                if (number - 1) % num_workers == worker and text and text.strip():
                    yield text, {"pass": current_pass, "number": number, "dataset": dataset.state_dict()}

    def _open_pass(self, seed: int | None, num_skipped: int, current_pass: int):
        """The dataset, in the first pass without the skipped documents, and the number of its first document."""
        if num_skipped and current_pass == 0:
            return self.dataset.skip(num_skipped), num_skipped
        dataset = copy.deepcopy(self.dataset)  # copy.copy shares its whole state, __setstate__ sees to that
        if seed is not None:
            dataset.set_epoch(seed % 2**31 + 1)  # an epoch other than 0 shuffles the shards, and no example is buffered
        return dataset, 0


def load_hub_dataset(source: str) -> HubDataset:
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r}: no such file, and not a Hugging Face dataset either (name or name:config)")
    import datasets

    try:
        dataset = datasets.load_dataset(match["name"], match["config"], split="train", streaming=True)
    except Exception as error:  # the library lets errors of every kind through: network, hub, script, parser
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source}: neither a local file nor a Hugging Face dataset that loads ({reason})") from error
    return HubDataset(source, dataset)


def find_files(source: str) -> list[str] | None:
    """The local files a source names, sorted; None when it names no local file and may be a dataset on the hub."""
    pattern = os.path.expanduser(source)
    suffixes = ", ".join(FORMATS)
    if os.path.isdir(pattern):
        paths = sorted(str(path) for path in Path(pattern).rglob("*") if path.is_file() and find_format(str(path)))
        if not paths:
            raise ValueError(f"{source}: the directory holds no text (looked for {suffixes})")
        return paths
    paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    for path in paths:
        if find_format(path) is None:
            raise ValueError(f"{path}: cannot read this kind of file (supported: {suffixes})")
    if not paths and glob.has_magic(pattern):
        raise ValueError(f"{source}: no file matches")
    if not paths and (find_format(pattern) or pattern.startswith(("/", "./", "../", "~"))):
        raise ValueError(f"{source}: no such file")
    return paths or None


def open_source(source: str) -> LocalFiles | HubDataset:
    """Local file, directory, glob, or `name[:config]` of a Hugging Face dataset; ValueError when it holds no text."""
    paths = find_files(source)
    opened = load_hub_dataset(source) if paths is None else LocalFiles(source, paths)
    if next(opened.read(seed=None, worker=0, num_workers=1, position=None), None) is None:
        raise ValueError(f"{source}: holds no text, not a single document")
    return opened


def iterate_documents(source: str | Sequence[str]) -> Iterator[str]:
    """Every document of a source, or of several, once and in file order."""
    for name in [source] if isinstance(source, str) else source:
        for document, _ in open_source(name).read(seed=None, worker=0, num_workers=1, position=None):
            yield document


class DocumentStream:
    """Endless documents of a source for one worker, shuffled in blocks, with a position that can be saved.

    A block is the next `buffer_size` documents in the order of the shards; it is shuffled as a whole. Unlike a sliding
    buffer, its content follows from where it starts, so the saved position is a few numbers and resuming is exact.
    """

    def __init__(self, source, *, seed: int, buffer_size: int, worker: int = 0, num_workers: int = 1):
        self.source = source
        self.seed = seed
        self.buffer_size = buffer_size
        self.worker, self.num_workers = worker, num_workers
        self.epoch = 0
        self.num_blocks = 0  # blocks begun
        self._block_start = None  # position in the pass over the source
        self._num_taken = 0
        self._block: list[str] = []
        self._block_end = None
        self._reader = None

    def __iter__(self):
        return self

    def __next__(self) -> str:
        """The next document; StopIteration only if there are fewer documents than workers and this one gets none."""
        if self._num_taken == len(self._block):
            self._begin_block()
            if not self._block:
                self.epoch, self._block_end, self._reader = self.epoch + 1, None, None
                self._begin_block()
            if not self._block:
                raise StopIteration
        document, self._block[self._num_taken] = self._block[self._num_taken], ""
        self._num_taken += 1
        return document

    def _begin_block(self) -> None:
        self._block_start, self._num_taken = self._block_end, 0
        self._read_block()
        self.num_blocks += 1

    def _read_block(self) -> None:
        """Read and shuffle the block that starts at `_block_start`."""
        if self._reader is None:
            self._reader = self.source.read(
                seed=derive_seed(self.seed, self.epoch),
                worker=self.worker,
                num_workers=self.num_workers,
                position=self._block_start,
            )
        num_documents = min(self.buffer_size, FIRST_BLOCK_DOCUMENTS << min(self.num_blocks, 32))
        self._block, num_characters = [], 0
        while len(self._block) < num_documents and num_characters < MAX_BLOCK_CHARACTERS:
            document, self._block_end = next(self._reader, (None, self._block_end))
            if document is None:
                break
            self._block.append(document)
            num_characters += len(document)
        random.Random(derive_seed(self.seed, "block", self.num_blocks)).shuffle(self._block)

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "num_blocks": self.num_blocks,
            "block_start": self._block_start,
            "num_taken": self._num_taken,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on after the document that was the last one when the state was taken. Reads one block again."""
        self.epoch, self._block_start, self._block_end = state["epoch"], state["block_start"], state["block_start"]
        self._reader, self._block, self._num_taken, self.num_blocks = None, [], 0, 0
        if state["num_blocks"]:
            self.num_blocks = state["num_blocks"] - 1
            self._read_block()
            self.num_blocks = state["num_blocks"]
            self._num_taken = state["num_taken"]
            if self._num_taken > len(self._block):
                raise ValueError(f"{self.source.name}: fewer documents than when the state was saved; start without it")
