"""Local files of text: which there are, where they are cut into shards, and the documents in each.

A file is read in shards (4 MB of a plain one, a row group of a parquet file, a whole compressed file), so that readers
can begin anywhere in a corpus of any size.
"""

import contextlib
import functools
import glob
import gzip
import json
import logging
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.mlm.seeds import derive_seed
from tasks.mlm.text_errors import LeftOut, TextError, first_line
from tasks.surrogates import replace_lone_surrogates

logger = logging.getLogger(__name__)


SHARD_BYTES = 2**22
MAX_DOCUMENT_BYTES = 2**20  # a .txt file without blank lines is cut here, at a line end or else at a blank
MAX_LINE_BYTES = 2**26  # of JSON; a longer line is left out unread
HEAD_BYTES = 2**16  # what is looked at to tell text in another encoding
MAX_STRANGE_SHARE = 0.1  # of the characters of a text; UTF-16 has half of them
MAX_WRONG_SHARE = 0.3  # of the characters at the beginning of a file that are not UTF-8; Windows-1251 has most of them
HOW_TO_CONVERT = "convert it (iconv -f WINDOWS-1251 -t UTF-8, or as it may be)"
# No text holds these, but UTF-16 and UTF-32 read as UTF-8 consist of them, and so does what was decoded wrongly once.
STRANGE = re.compile("[\0-\x08\x0e-\x1a\x7f-\x84\x86-\x9f]")
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
Record = tuple[int, int, bytes | str]  # number in its shard, offset or line (for error messages), content


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
