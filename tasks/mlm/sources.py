"""Documents of the training text: local files and streamed Hugging Face datasets, in seeded order.

A source is read in shards (4 MB of a plain file, a row group of a parquet file, a whole compressed file). The order of
the shards depends on the seed, so trainers with different seeds begin in different places of a corpus of any size.

A document that cannot be read is left out, and said; a file that cannot be read further is an error (`TextError`).
"""

import contextlib
import copy
import functools
import glob
import gzip
import hashlib
import json
import logging
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.models.hub import explain_hub_error, give_up_on_silence
from tasks.surrogates import replace_lone_surrogates

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**22
MAX_DOCUMENT_BYTES = 2**20  # a .txt file without blank lines is cut here, at a line end or else at a blank
MAX_LINE_BYTES = 2**26  # of JSON; a longer line is left out unread
HEAD_BYTES = 2**16  # what is looked at to tell text in another encoding
MAX_STRANGE_SHARE = 0.1  # of the characters of a text; UTF-16 has half of them
MAX_WRONG_SHARE = 0.3  # of the characters at the beginning of a file that are not UTF-8; Windows-1251 has most of them
MIN_LEFT_OUT = 100  # documents left out before it matters whether they are the larger part
FIRST_BLOCK_DOCUMENTS = 256  # the shuffle buffer starts small and doubles: training need not wait until it is full
MAX_BLOCK_CHARACTERS = 2**25  # 64 MB of Russian text, whatever the number of documents
MAX_SKIPPED_DOCUMENTS = 10_000  # of a streamed dataset that has but one shard
HUB_PATIENCE_SECONDS = 600.0  # how long a hub that does not answer is asked again
MAX_HUB_WAIT_SECONDS = 30.0
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?")
DEFAULT_SOURCE = str(Path(__file__).resolve().parents[2] / "demo" / "corpus" / "*.txt")

HOW_TO_CONVERT = "convert it (iconv -f WINDOWS-1251 -t UTF-8, or as it may be)"
# No text holds these, but UTF-16 and UTF-32 read as UTF-8 consist of them, and so does what was decoded wrongly once.
STRANGE = re.compile("[\0-\x08\x0e-\x1a\x7f-\x84\x86-\x9f]")
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

Record = tuple[int, int, bytes | str]  # number in its shard, offset or line (for error messages), content


def derive_seed(*parts) -> int:
    """A 63-bit seed that is the same in every process (`hash` is not) and differs when any of the parts does."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TextError(ValueError):
    """Text that cannot be read; the message is one line that says which and why.

    torch raises an error of a data loader's worker anew, with the worker's traceback for a message. Of that only the
    last line is kept.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.rpartition("TextError: ")[2].split()))


class LeftOut:
    """Documents of a source that were left out because they cannot be read.

    The first is said with the reason, later ones when there are ten times as many. When most of the documents are such,
    the source is something else than it should be: a TextError.
    """

    def __init__(self, name: str):
        self.name = name
        self.num_read = 0  # documents looked at, those of an earlier pass again
        self.places: set[tuple] = set()
        self.first = ""
        self.is_opening = True  # nothing is said yet: if there is no document at all, the reason is the error

    def add(self, place: tuple, reason: str, name: Callable[[], str]) -> None:
        """`place` tells documents apart; `name` gives file and place for a person, and may take its time."""
        if place in self.places:
            return
        self.places.add(place)
        count = len(self.places)
        self.first = self.first or f"{name()}: {reason}"
        if count == 1 and not self.is_opening:
            self.say_first()
        elif count >= MIN_LEFT_OUT and 2 * count > self.num_read:
            raise TextError(f"{self.name}: {count} of {self.num_read} documents cannot be read; {name()}: {reason}")
        elif str(count).strip("0") == "1" and not self.is_opening:  # 10, 100, ...
            logger.warning("%s: %d documents left out that cannot be read; %s: %s", self.name, count, name(), reason)

    def say_first(self) -> None:
        logger.warning("%s; left out, as is every document that cannot be read", self.first)

    def opened(self) -> None:
        """A document was found."""
        self.is_opening = False
        if self.places:
            self.say_first()


def decode(record: bytes) -> str:
    """UTF-8, also as Java and JavaScript write it: halves of characters as characters of their own."""
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError:
        try:
            return record.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            pass
        raise


def find_wrong_byte(record: bytes) -> int:
    """The offset of the first byte that is not UTF-8; the length if all are."""
    try:
        record.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(record)


def check_text(text: str) -> str:
    """The text, without halves of characters. Raises ValueError if it consists of control characters."""
    if STRANGE.search(text) and len(STRANGE.findall(text)) > MAX_STRANGE_SHARE * len(text):
        raise ValueError("control characters, as UTF-16 has when it is read as UTF-8; convert it (iconv -t UTF-8)")
    return replace_lone_surrogates(text)


def check_head(path: str, head: bytes) -> None:
    """Raises ValueError if a file begins in another encoding than UTF-8, or with lines that no line feed ends."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"{path}: {encoding} text; convert it (iconv -f {encoding} -t UTF-8)")
    text = head.decode("utf-8", "replace")
    if len(STRANGE.findall(text)) > MAX_STRANGE_SHARE * len(text):
        kind = "UTF-16 or UTF-32 without a byte order mark" if "\0" in text else "no text"
        raise ValueError(f"{path}: {kind}; convert it to UTF-8 (iconv -f UTF-16LE -t UTF-8, or as it may be)")
    if text.count("\ufffd") > MAX_WRONG_SHARE * len(text):
        raise ValueError(f"{path}: not UTF-8 text at byte {find_wrong_byte(head)}; {HOW_TO_CONVERT}")
    if b"\r" in head and b"\n" not in head and len(head.rstrip().split(b"\r")) > 2:
        raise ValueError(f"{path}: lines end in a carriage return alone; convert it (tr '\\r' '\\n')")


@dataclass(frozen=True)
class Shard:
    """Part of a file: byte range of a plain file, one row group of a parquet file, or a whole compressed file."""

    path: str
    start: int = 0
    stop: int = 0


def list_byte_ranges(path: str) -> list[Shard]:
    with open(path, "rb") as file:
        check_head(path, file.read(HEAD_BYTES))
    size = os.path.getsize(path)
    return [Shard(path, start, min(start + SHARD_BYTES, size)) for start in range(0, size, SHARD_BYTES)]


def find_gap(piece: bytes, start: int) -> int:
    """Where part of a long line may be cut: after the first blank from `start` on, or else between two characters."""
    blank = piece.find(b" ", start)
    if blank >= 0:
        return blank + 1
    return next((index for index in range(start, len(piece)) if piece[index] & 0xC0 != 0x80), len(piece))


def find_border(path: str, offset: int) -> int:
    """Where the documents of a .txt file that belong to the part before `offset` end: at the next blank line.

    A file without blank lines is not searched to its end for one: after MAX_DOCUMENT_BYTES the next line will do, and
    in a line longer than that a blank.
    """
    if offset == 0:
        return 0
    with open(path, "rb") as file:
        file.seek(offset - 1)
        line = file.readline(MAX_DOCUMENT_BYTES)
        if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            return offset - 1 + find_gap(line, 1)
        next_line = position = offset - 1 + len(line)
        while position < next_line + MAX_DOCUMENT_BYTES:
            line = file.readline(MAX_DOCUMENT_BYTES)
            if not line.strip():  # or the end of the file
                return position
            position += len(line)
    return next_line


def read_text_documents(shard: Shard, start_fraction: float) -> Iterator[Record]:
    """Runs of lines between blank lines. A document belongs to the shard in which the blank line before it starts."""
    number, first_offset, lines, size = 0, 0, [], 0
    offset, end = find_border(shard.path, shard.start), find_border(shard.path, shard.stop)
    with open(shard.path, "rb") as file:
        file.seek(offset)
        while offset < end and (line := file.readline(min(MAX_DOCUMENT_BYTES, end - offset))):
            is_part = len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n")
            if is_part:
                line = line[: find_gap(line, len(line) - len(line) // 16)]
                file.seek(offset + len(line))
            is_blank = not line.strip()
            if lines and (is_blank or size >= MAX_DOCUMENT_BYTES):
                yield number, first_offset, b"".join(lines)
                number, lines, size = number + 1, [], 0
            if not is_blank:
                first_offset = first_offset if lines else offset
                lines.append(line)
                size += MAX_DOCUMENT_BYTES if is_part else len(line)
            offset += len(line)
    if lines:
        yield number, first_offset, b"".join(lines)


def parse_text(location: int, record: bytes) -> str:
    try:
        return check_text(decode(record).removeprefix("\ufeff")).strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {location + error.start}; {HOW_TO_CONVERT}") from None
    except ValueError as error:
        raise ValueError(f"from byte {location} on: {error}") from None


def iterate_lines(file) -> Iterator[tuple[bytes, int]]:
    """(line, its length); of one that is too long the beginning only, so that memory does not depend on the file."""
    while line := file.readline(MAX_LINE_BYTES):
        length = len(line)
        if length == MAX_LINE_BYTES and not line.endswith(b"\n"):
            length += skip_line(file)
        yield line, length


def skip_line(file) -> int:
    """Go to the next line; how many bytes it was to it."""
    length = 0
    while piece := file.readline(2**20):
        length += len(piece)
        if piece.endswith(b"\n"):
            break
    return length


def read_json_lines(shard: Shard, start_fraction: float) -> Iterator[Record]:
    """The lines that start in the shard."""
    number = 0
    with open(shard.path, "rb") as file:
        offset = 0
        if shard.start:
            file.seek(shard.start - 1)
            offset = shard.start - 1 + skip_line(file)
        for line, length in iterate_lines(file):
            if offset >= shard.stop:
                return
            if line.strip():
                yield number, offset, line
                number += 1
            offset += length


def name_line(shard: Shard, offset: int) -> str:
    if offset > 2**30:
        return f"{shard.path}, byte {offset}"
    with open(shard.path, "rb") as file:
        pieces = (file.read(min(2**20, offset - start)) for start in range(0, offset, 2**20))
        number = sum(piece.count(b"\n") for piece in pieces) + 1
    return f"{shard.path}, line {number}"


def parse_json_line(location: int, record: bytes) -> str:
    if len(record) == MAX_LINE_BYTES and not record.endswith(b"\n"):
        raise ValueError(f"a line of {MAX_LINE_BYTES >> 20} MB or more; JSON Lines are one document a line")
    try:
        content = json.loads(decode(record).removeprefix("\ufeff"))
    except UnicodeDecodeError:
        raise ValueError(f"not UTF-8 text; {HOW_TO_CONVERT}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    if not isinstance(content, dict) or "text" not in content:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'no field "text" (found: {found[:80]})')
    return parse_value(location, content["text"])


def parse_value(location: int, value) -> str:
    """What a field or column "text" holds, as text."""
    if isinstance(value, bytes):  # a parquet column without the note that it is UTF-8, or with a value that is not
        try:
            value = decode(value)
        except UnicodeDecodeError:
            raise ValueError('"text" is not UTF-8 text') from None
    if not isinstance(value, str):
        raise ValueError(f'field "text" is not a string but {"null" if value is None else type(value).__name__}')
    return check_text(value)


def list_whole_file(path: str) -> list[Shard]:
    with open(path, "rb") as compressed, gzip.open(compressed) as file, told_as_damaged_gzip(path):
        check_head(path, file.read(HEAD_BYTES))
    return [Shard(path, 0, os.path.getsize(path))]


@contextlib.contextmanager
def told_as_damaged_gzip(path: str, place: Callable[[], str] = str):
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}{place()}: not a complete gzip file ({error}); download or compress it again"
        ) from None


def read_gzip_lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """(bytes of the compressed file read so far, line number from 1, line) of the lines that are not blank."""
    line_number = 0
    with (
        open(path, "rb") as compressed,
        gzip.open(compressed) as file,
        told_as_damaged_gzip(path, lambda: f" after line {line_number}"),
    ):
        for line, _ in iterate_lines(file):
            line_number += 1
            if line.strip():
                yield compressed.tell(), line_number, line


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


def name_number(shard: Shard, number: int) -> str:
    return f"{shard.path}, line {number}"


def open_parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not there, not allowed
            raise
        raise ValueError(f"{path}: not a parquet file ({first_line(error)})") from None
    if "text" not in file.schema_arrow.names:
        raise ValueError(f'{path}: no column "text" (found: {", ".join(file.schema_arrow.names)[:80]})')
    return file


def list_row_groups(path: str) -> list[Shard]:
    with open_parquet(path) as file:
        return [Shard(path, group, group + 1) for group in range(file.num_row_groups)]


def read_parquet_records(shard: Shard, start_fraction: float) -> Iterator[Record]:
    import pyarrow

    number = 0
    with open_parquet(shard.path) as file:
        batches = file.iter_batches(batch_size=256, row_groups=[shard.start], columns=["text"])
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(
                    f"{name_row(shard, number)}: the file is damaged ({first_line(error)}); download or write it again"
                ) from None
            if batch is None:
                return
            for text in list_values(batch.column(0)):
                yield number, number, text
                number += 1


def list_values(column) -> list:
    """Values of a column; of strings that are not all UTF-8 the bytes, so that one of them does not cost the others."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()


def name_row(shard: Shard, number: int) -> str:
    return f"{shard.path}, row {number} of row group {shard.start}"


@dataclass(frozen=True)
class FileFormat:
    """How files with one suffix are split into shards, shards read as records, and records turned into text.

    `read` raises ValueError when the file cannot be read further, `parse` when one record is no text; what is wrong is
    then said together with where it is, which `name` tells for a shard and a record's location.
    """

    list_shards: Callable[[str], list[Shard]]
    read: Callable[[Shard, float], Iterator[Record]]
    parse: Callable[[int, bytes | str], str]
    name: Callable[[Shard, int], str]


FORMATS = {
    ".txt": FileFormat(list_byte_ranges, read_text_documents, parse_text, lambda shard, _: shard.path),
    ".jsonl": FileFormat(list_byte_ranges, read_json_lines, parse_json_line, name_line),
    ".jsonl.gz": FileFormat(list_whole_file, read_gzip_records, parse_json_line, name_number),
    ".parquet": FileFormat(list_row_groups, read_parquet_records, parse_value, name_row),
}


def find_format(path: str) -> FileFormat | None:
    return next((file_format for suffix, file_format in FORMATS.items() if path.lower().endswith(suffix)), None)


def read_records(shard: Shard, start_fraction: float) -> Iterator[Record]:
    """The records of a shard; TextError when it cannot be read further."""
    try:
        yield from find_format(shard.path).read(shard, start_fraction)
    except OSError as error:
        raise TextError(f"{shard.path}: cannot be read ({error.strerror or first_line(error)})") from error
    except ValueError as error:
        raise TextError(str(error)) from error


class LocalFiles:
    """Documents in local files. `open_reader` gives the documents of one pass, in an order that depends on the seed."""

    def __init__(self, name: str, paths: Sequence[str]):
        self.name = name
        self.left_out = LeftOut(name)
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
            for count, (number, location, record) in enumerate(read_records(shard, start_fraction), 1):
                if count <= num_records_done or (number + shard_number) % num_workers != worker:
                    continue
                self.left_out.num_read += 1
                try:
                    text = file_format.parse(location, record)
                except ValueError as error:
                    name = functools.partial(file_format.name, shard, location)
                    self.left_out.add((shard_number, number), str(error), name)
                    continue
                if text.strip():
                    yield text, [turn, count]
            num_records_done = 0


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if it has one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: the server is in trouble or the connection broke, but it did not refuse."""
    from huggingface_hub.utils import httpx

    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 425, 429)
    while error is not None:
        is_aiohttp = type(error).__module__.startswith("aiohttp")  # its errors have no common base that is not its own
        if is_aiohttp or isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return True
        error = error.__cause__ or error.__context__
    return False


class Patience:
    """Waits, longer each time, while a server does not answer; says so once, and gives up after a while."""

    def __init__(self, name: str):
        self.name = name
        self._began: float | None = None
        self._wait = 1.0

    def succeeded(self) -> None:
        if self._began is not None:
            logger.warning("%s: the hub answers again", self.name)
            self._began, self._wait = None, 1.0

    def wait(self, error: Exception) -> None:
        """Raises TextError when there is no use in waiting (any more)."""
        now = time.monotonic()
        if not may_pass(error):
            raise TextError(
                f"{self.name}: the hub refused or sent something unreadable ({reason_of(error)})"
            ) from error
        if self._began is None:
            self._began = now
            logger.warning(
                "%s: the hub does not answer (%s); trying again for %.0f minutes",
                self.name,
                reason_of(error),
                HUB_PATIENCE_SECONDS / 60,
            )
        elif now - self._began > HUB_PATIENCE_SECONDS:
            raise TextError(
                f"{self.name}: the hub has not answered for {now - self._began:.0f} s ({reason_of(error)})"
            ) from error
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, MAX_HUB_WAIT_SECONDS)


def reason_of(error: BaseException) -> str:
    """What an error says, short: the first line that is not a number of the hub's own; addresses may be very long."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    status = status_of(error)
    kind = type(error).__name__ if status is None else f"HTTP {status}"
    return f"{kind}: {lines[0].partition(' (Request ID')[0].strip()}"[:200] if lines else kind


class HubDataset:
    """Documents in the column "text" of a Hugging Face dataset's split "train", streamed."""

    def __init__(self, name: str, dataset):
        self.name = name
        self.left_out = LeftOut(name)
        self.dataset = dataset
        if dataset.features is not None and "text" not in dataset.features:
            raise ValueError(f'{name}: no column "text" (found: {", ".join(dataset.features)[:80]})')

    def read(self, *, seed: int | None, worker: int, num_workers: int, position) -> Iterator[tuple[str, dict]]:
        """(document, position after it) of one pass, in an order of the dataset's own shards given by the seed.

        A dataset of a single shard begins at one of its first MAX_SKIPPED_DOCUMENTS instead, and wraps around. While
        the hub does not answer, this waits and then goes on where it was. TextError when it refuses.
        """
        patience = Patience(self.name)
        while True:
            try:
                for text, new_position in self._read(seed, worker, num_workers, position):
                    patience.succeeded()
                    position = new_position
                    yield text, position
                return
            except TextError:
                raise
            except Exception as error:  # the library lets errors of every kind through: network, hub, parser
                patience.wait(error)

    def _read(self, seed: int | None, worker: int, num_workers: int, position) -> Iterator[tuple[str, dict]]:
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
                    raise TextError(f'{self.name}: no column "text" (found: {", ".join(batch)[:80]})')
                number += 1
                if (number - 1) % num_workers != worker:
                    continue
                text = self._parse(number - 1, batch["text"][0])
                if text.strip():
                    yield text, {"pass": current_pass, "number": number, "dataset": dataset.state_dict()}

    def _parse(self, number: int, value) -> str:
        self.left_out.num_read += 1
        try:
            return parse_value(number, value)
        except ValueError as error:
            self.left_out.add((number,), str(error), f"{self.name}, document {number}".__str__)
            return ""

    def _open_pass(self, seed: int | None, num_skipped: int, current_pass: int):
        """The dataset, in the first pass without the skipped documents, and the number of its first document."""
        if num_skipped and current_pass == 0:
            return self.dataset.skip(num_skipped), num_skipped
        from huggingface_hub import HfFileSystem

        # copy.copy shares a dataset's whole state, __setstate__ sees to that. What is not to be copied is the cache of
        # connections that it holds: each thread and process has its own there, and copying adds them while it copies.
        connections = HfFileSystem._cache
        dataset = copy.deepcopy(self.dataset, {id(connections): connections})
        if seed is not None:
            dataset.set_epoch(seed % 2**31 + 1)  # an epoch other than 0 shuffles the shards, and no example is buffered
        return dataset, 0


def load_hub_dataset(source: str) -> HubDataset:
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r}: no such file, and not a Hugging Face dataset either (name or name:config)")
    import datasets

    give_up_on_silence()
    try:
        dataset = datasets.load_dataset(match["name"], match["config"], split="train", streaming=True)
    except Exception as error:  # the library lets errors of every kind through: network, hub, script, parser
        if configurations := re.search(r"available configs: \[(.*?)\]", str(error)):
            names = ", ".join(f"{match['name']}:{name.strip(' ')[1:-1]}" for name in configurations[1].split(","))
            raise ValueError(f"{source}: has several configurations; pass one of them: {names}") from error
        if status_of(error) is not None or may_pass(error):  # it is the hub: the library's own words hide what it said
            reason, advice = explain_hub_error(error)
            raise ValueError(
                f"{source}: no local file, and the hub does not give such a dataset ({reason}); {advice}"
            ) from error
        reason = first_line(error)
        raise ValueError(f"{source}: neither a local file nor a Hugging Face dataset that loads ({reason})") from error
    return HubDataset(source, dataset)


def list_directory(source: str, directory: str) -> list[str]:
    """The files of a directory that hold text, sorted. Hidden ones and copies made by macOS are none of it."""
    names = (path.relative_to(directory) for path in Path(directory).rglob("*") if path.is_file())
    paths = [
        str(Path(directory) / name)
        for name in sorted(names)
        if not any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    ]
    others = [path for path in paths if find_format(path) is None]
    if others:
        examples = ", ".join(os.path.relpath(path, directory) for path in others[:3])
        logger.warning("%s: %d files of other kinds are left out (%s)", source, len(others), examples)
    return [path for path in paths if find_format(path) is not None]


def find_files(source: str) -> list[str] | None:
    """The local files a source names, sorted; None when it names no local file and may be a dataset on the hub."""
    pattern = os.path.expanduser(source)
    suffixes = ", ".join(FORMATS)
    if os.path.isdir(pattern):
        paths = list_directory(source, pattern)
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
        raise ValueError(opened.left_out.first or f"{source}: holds no text, not a single document")
    opened.left_out.opened()
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
