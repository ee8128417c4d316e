"""Read a file of rows as it is: one row at a time, each with its place, no type guessed from other rows."""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, first_line
from .shapes import NotAPair

TEXT, BINARY = (".jsonl", ".ndjson", ".json", ".csv", ".tsv"), (".parquet", ".arrow")
PACKED = (".gz", ".zst", ".zip")
SUFFIXES = TEXT + BINARY + PACKED
FORMATS = f"Known are {', '.join(TEXT + BINARY)}; each may be packed as {', '.join(PACKED)}."

_BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, pa.ArrowException)
_HEAD = 1024  # bytes that tell what a file is
_BATCH = 256  # rows that are made Python objects at once


def kind(path: Path) -> str:
    """The suffix that names the format, in small letters, such as ".jsonl" of `pairs.JSONL.gz`; "" of another file.

    Raises:
        DataError: a damaged `.zip`, or one that holds not exactly one file.
    """
    suffixes = [s.lower() for s in Path(_member(path) if path.suffix.lower() == ".zip" else path.name).suffixes]
    named = [s for s in suffixes[-2:] if s not in PACKED][-1:]
    return named[0] if named and named[0] in TEXT + BINARY else ""


def _member(path: Path) -> str:
    """The name of the one file in a `.zip`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
    except _BROKEN as error:
        raise _unreadable(path, error) from error
    if len(names) != 1:
        raise DataError(f"{path.name} holds {len(names)} files.", "Pack one file, or unpack it into a folder.")
    return names[0]


def rows(path: Path, numbers: Collection[str] = ()) -> Iterator[tuple[str, object]]:
    """Every row of a file with its place, such as ("pairs.jsonl, line 7", {…}). Lines and rows count from 1.

    What cannot be read is a row too, a `NotAPair` of reason "unreadable line". Blank lines are no rows. Of a table of
    text, cells in the columns `numbers` are numbers.

    Raises:
        DataError: no file of a known format, none that may be read, or no data in it.
    """
    suffix = kind(path)
    if not suffix:
        raise DataError(f"{path.name} is of no known format.", FORMATS)
    try:
        with path.open("rb") as stream:
            _refuse(stream.read(_HEAD), path.name)
        with _opened(path) as stream:
            if suffix in BINARY:
                yield from tables(_batches(path, stream, suffix), path.name)
                return
            _refuse(stream.peek(_HEAD)[:_HEAD], path.name, text=True)
            if stream.peek(3).startswith(codecs.BOM_UTF8):
                stream.read(3)
            if suffix in (".csv", ".tsv"):
                yield from _cells(stream, path.name, "," if suffix == ".csv" else "\t", numbers)
            elif suffix == ".json" or stream.peek(_HEAD).lstrip().startswith(b"["):
                yield from _document(stream.read(), path.name)
            else:
                yield from _lines(stream, path.name)
    except (*_BROKEN, csv.Error) as error:
        raise _unreadable(path, error) from error


def _unzipped(path: Path) -> IO[bytes]:
    try:
        return zipfile.ZipFile(path).open(_member(path))  # noqa: SIM115  # closed with what it gives
    except RuntimeError as error:  # it asks for a password, or is packed in a way that zipfile does not know
        raise zipfile.BadZipFile(str(error)) from error


_OPEN = {
    ".gz": gzip.open,
    ".zst": lambda path: pa.input_stream(str(path), compression="zstd"),
    ".zip": _unzipped,
}


def _opened(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_OPEN.get(path.suffix.lower(), io.FileIO)(path), 2**16)  # type: ignore[operator]


def _refuse(head: bytes, name: str, text: bool = False) -> None:
    """Say what a file is whose first bytes are no data."""
    opening, encoding = head.removeprefix(codecs.BOM_UTF8).strip().lower(), json.detect_encoding(head)
    if not opening:
        raise DataError(f"{name} is empty.", "Write or fetch it again.")
    if opening.startswith(b"version https://git-lfs"):
        raise DataError(f"{name} is a pointer of Git LFS, not the data.", "Fetch the data: `git lfs pull`.")
    if opening.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{name} is a web page, not the data.", "Fetch the file itself, not its page.")
    if text and head.startswith((b"PK\3\4", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1")):
        raise DataError(f"{name} is packed or a binary table, not text.", f"Name it after what it is. {FORMATS}")
    if text and not encoding.startswith("utf-8"):
        raise DataError(f"{name} is in {encoding.upper()}, not in UTF-8.", "Save it as UTF-8.")


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path.name} could not be read: {first_line(error)}", "Write or fetch it again.")


def _not_utf8(error: UnicodeDecodeError) -> NotAPair:
    return NotAPair("unreadable line", f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start + 1}")


# --- the formats --------------------------------------------------------------------------------------------------


def _lines(stream: Iterable[bytes], name: str) -> Iterator[tuple[str, object]]:
    """JSON Lines: one row a line."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield f"{name}, line {number}", _parsed(line)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except (ValueError, RecursionError) as error:
        return NotAPair("unreadable line", f"no JSON: {first_line(error)}")


def _document(data: bytes, name: str) -> Iterator[tuple[str, object]]:
    """JSON: an array of rows, one object with one list of rows, or lines after all."""
    text = data.decode(errors="surrogateescape")  # bytes that are not UTF-8 cost the row that holds them
    if not text.lstrip().startswith("["):
        try:
            whole = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return (yield from _lines(io.BytesIO(data), name))
        lists = [v for v in whole.values() if isinstance(v, list) and any(isinstance(row, dict) for row in v)]
        if len(lists) != 1:
            raise DataError(
                f"{name} is one object with {len(lists)} lists of objects.",
                "Write an array of rows, one list of rows in an object, or one row a line as .jsonl.",
            )
        yield from ((f"{name}, row {number}", row) for number, row in enumerate(lists[0], 1))
        return
    decoder, between, at = json.JSONDecoder(), re.compile(r"[\s,]*"), text.index("[") + 1
    for number in itertools.count(1):
        at = between.match(text, at).end()  # type: ignore[union-attr]  # it matches anywhere
        if text.startswith("]", at):
            if text[at + 1 :].strip():
                yield f"{name}, row {number}", NotAPair("unreadable line", "more follows after the end of the array")
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:  # nobody can tell where the next row begins
            yield f"{name}, row {number}", NotAPair("unreadable line", f"the array breaks off: {first_line(error)}")
            return
        yield f"{name}, row {number}", row


def _cells(stream: io.BufferedReader, name: str, delimiter: str, numbers: Collection[str]) -> Iterator:
    """A table of text: a header, then one row a line; a cell may hold line breaks in quotes."""
    csv.field_size_limit(2**31 - 1)
    head = re.split(rb"[\r\n]", stream.peek(_HEAD).lstrip(b"\r\n"), maxsplit=1)[0]
    if b"," not in head:  # spreadsheets write semicolons or tabs in some countries
        delimiter = ";" if b";" in head else "\t"
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header = [cell.strip() for cell in next(filter(None, reader), [])]
    if twice := sorted({cell for cell in header if cell and header.count(cell) > 1}):  # spreadsheets add unnamed ones
        raise DataError(f"{name} has two columns of one name: {', '.join(twice)}.", "Give each a name of its own.")
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, NotAPair("unreadable line", f"no row of a table: {error}")
            continue
        if len(cells) == len(header):
            yield place, {n: _number(c) if n in numbers else c for n, c in zip(header, cells, strict=True)}
        elif cells:
            yield place, NotAPair("unreadable line", f"{len(cells)} cells where the header has {len(header)}")


def _number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        return cell


def _batches(path: Path, stream: io.BufferedReader, suffix: str) -> Iterator[pa.RecordBatch]:
    packed = path.suffix.lower() in PACKED
    source = pa.BufferReader(stream.read()) if packed else pa.memory_map(str(path))
    if suffix == ".parquet":
        return pq.ParquetFile(source).iter_batches(_BATCH)
    try:
        file = pa.ipc.open_file(source)
        return (file.get_batch(i) for i in range(file.num_record_batches))
    except pa.ArrowInvalid:  # the other kind of Arrow file, which `datasets` writes
        source.seek(0)
        return iter(pa.ipc.open_stream(source))


def tables(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[tuple[str, object]]:
    """The rows of Arrow tables; text that is not UTF-8 costs its own row only."""
    number = itertools.count(1)
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            try:
                found: list = part.to_pylist()
            except UnicodeDecodeError:
                found = [_row(part.slice(i, 1)) for i in range(part.num_rows)]
            yield from ((f"{name}, row {next(number)}", row) for row in found)


def _row(batch: pa.RecordBatch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return _not_utf8(error)
