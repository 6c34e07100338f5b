"""Data files -> tables: tsv, csv, jsonl, parquet and npz.

TSV is plain here, as the public data sets write it: a tab separates, a line ends a row, a quote is
a quote. CSV follows RFC 4180. All text is strict UTF-8; a byte order mark is let go.
"""

from __future__ import annotations

import csv
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ...errors import BadInputError, UsageError, missing_extra
from ...files import strict_json
from ...files.container import open_regular
from .table import Complaints, Table, brief, not_empty

MAX_LINE_BYTES = 4 << 20
MAX_NPZ_BYTES = 16 << 30
# What zipfile, its decompressors and numpy raise for damaged archives; the runtime errors are about
# features of zip files that numpy never writes.
_DAMAGED_NPZ = (
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    OverflowError,
    struct.error,
)
_BOM = b"\xef\xbb\xbf"


def read_table(path: str | os.PathLike[str]) -> Table:
    """The rows of a data file; its name's ending says which format it is.

    Args:
        path: .tsv, .csv, .jsonl (or .ndjson), .parquet or .npz.

    Returns:
        At least one row. Values are text in tsv and csv, what JSON or Arrow say in jsonl and
        parquet, and slices of the arrays in npz.

    Raises:
        FileAccessError: missing or unreadable.
        UsageError: an ending that is not known.
        BadInputError: not a file of this format; all bad rows are listed.
        MissingExtraError: parquet needs pyarrow.
    """
    os.close(open_regular(path))
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise UsageError(
            path,
            expected=f"a file that ends in {', '.join(_READERS)}",
            found=repr(suffix) if suffix else "no ending",
            remedy="rename it to what it is",
        )
    return not_empty(_READERS[suffix](os.fspath(path)))


def text_lines(path: str, complaints: Complaints) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its line ending) of every line that is sound UTF-8 text."""
    with open(open_regular(path), "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"line {number}"
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                complaints.add(place, f"more than {MAX_LINE_BYTES} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if b"\0" in line:
                complaints.add(place, "a NUL byte")
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                complaints.add(place, f"bytes that are not UTF-8 at offset {error.start}")
                continue
            yield number, text.removesuffix("\n").removesuffix("\r")


def _read_tsv(path: str) -> Table:
    complaints = Complaints(path, "rows of UTF-8 text with the header's columns")
    rows = ((number, text.split("\t")) for number, text in text_lines(path, complaints) if text)
    return _with_header(path, rows, complaints)


def _read_csv(path: str) -> Table:
    complaints = Complaints(path, "rows of UTF-8 text with the header's columns")
    # The reader wants the line endings that quoted cells may hold.
    lines = (text + "\n" for _, text in text_lines(path, complaints))
    reader = csv.reader(lines, strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            complaints.add(f"line {reader.line_num}", f"not CSV: {error}")

    return _with_header(path, rows(), complaints)


def _with_header(path: str, rows: Iterator[tuple[int, list[str]]], complaints: Complaints) -> Table:
    """A table of rows of cells, the first of which names the columns."""
    names: list[str] | None = None
    kept: list[list[str]] = []
    places: list[str] = []
    for number, cells in rows:
        if names is None:
            names = [name.strip() for name in cells]
            if len(set(names)) != len(names) or not all(names):
                complaints.add(f"line {number}", f"column names {brief(names)}")
        elif len(cells) != len(names):
            complaints.add(f"line {number}", f"{len(cells)} columns, the header has {len(names)}")
        else:
            kept.append(cells)
            places.append(f"line {number}")
    complaints.check()
    if names is None:
        raise BadInputError(path, expected="a header line", found="an empty file")
    return Table(path, {name: [row[i] for row in kept] for i, name in enumerate(names)}, places)


def _read_jsonl(path: str) -> Table:
    complaints = Complaints(path, "one JSON object per line")
    records: list[dict[str, Any]] = []
    places: list[str] = []
    for number, text in text_lines(path, complaints):
        if not text.strip():
            continue
        try:
            record = strict_json.loads(text, path)
        except BadInputError as error:
            complaints.add(f"line {number}", error.found)
            continue
        if isinstance(record, dict):
            records.append(record)
            places.append(f"line {number}")
        else:
            complaints.add(f"line {number}", f"{type(record).__name__}, not an object")
    complaints.check()
    return _of_records(path, records, places)


def _of_records(path: str, records: list[dict[str, Any]], places: list[str]) -> Table:
    names = dict.fromkeys(name for record in records for name in record)
    return Table(path, {name: [r.get(name) for r in records] for name in names}, places)


def _read_parquet(path: str) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_extra(str(error.name), "hf", f"reading {path}") from None
    try:
        table = pq.read_table(path, memory_map=False)
        # Text that is not UTF-8 shows only here.
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        _unreadable(path, "a parquet file", error)
    return Table(path, columns, [f"row {i + 1}" for i in range(table.num_rows)])


def _read_npz(path: str) -> Table:
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(info.file_size for info in archive.infolist())
            if claimed > MAX_NPZ_BYTES:
                raise BadInputError(
                    path, expected=f"at most {MAX_NPZ_BYTES} bytes of arrays", found=f"{claimed}"
                )
            _check_headers(path, archive)
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    except _DAMAGED_NPZ as error:
        _unreadable(path, "an npz file of plain arrays", error)
    lengths = {name: len(a) if a.ndim else -1 for name, a in columns.items()}
    if len(set(lengths.values())) > 1 or -1 in lengths.values():
        shapes = [f"{name}: shape {list(a.shape)}" for name, a in columns.items()]
        raise BadInputError(
            path,
            expected="arrays with one entry per row",
            found="arrays of different lengths",
            offenders=shapes,
        )
    count = next(iter(lengths.values()), 0)
    return Table(path, columns, [f"row {i + 1}" for i in range(count)])


def _check_headers(path: str, archive: zipfile.ZipFile) -> None:
    """Refuse arrays that claim more bytes than the archive holds for them."""
    for info in archive.infolist():
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
        claimed = int(np.prod([int(size) for size in shape], dtype=object)) * dtype.itemsize
        if not dtype.hasobject and claimed > info.file_size:
            raise BadInputError(
                f"{path}, array {info.filename}",
                expected=f"at most {info.file_size} bytes",
                found=f"a claim of {claimed}",
                remedy="get the file again",
            )


def _unreadable(path: str, expected: str, error: BaseException) -> NoReturn:
    text = str(error).strip()
    found = text.splitlines()[0] if text else type(error).__name__
    raise BadInputError(path, expected=expected, found=found, remedy="check the file") from error


_READERS: dict[str, Callable[[str], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}
