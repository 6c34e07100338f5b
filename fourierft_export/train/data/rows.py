"""Data files, folders and Hub ids -> rows in columns, and checks that list every bad row.

Text files are read here, line by line, so that every bad row is listed with its line; everything
else is read by `datasets.load_dataset`.
"""

from __future__ import annotations

import csv
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BadInputError, FileAccessError, UsageError, first_line
from ...files import strict_json
from ...files.safetensors_reader import open_regular

TABLES, PARQUET = (".tsv", ".csv"), ".parquet"
ENDINGS = (*TABLES, ".jsonl", ".ndjson", PARQUET)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
MAX_ROWS = 100_000_000
MAX_PARQUET_BYTES = 64 << 30  # of its columns, uncompressed
CORRECT = "correct or remove them"


def refuse_rows(where: str, bad: Sequence[str], expected: str, remedy: str = CORRECT) -> None:
    """Raise BadInputError with all bad rows, "PLACE: what is there", if there are any."""
    if bad:
        found = (f"{len(bad)} bad rows, first " if len(bad) > 1 else "") + bad[0]
        offenders = bad if len(bad) > 1 else ()
        raise BadInputError(
            where, expected=expected, found=found, remedy=remedy, offenders=offenders
        )


def read_each(
    where: str,
    places: Iterable[str],
    values: Iterable[Any],
    read: Callable[[Any], Any],
    expected: str,
    remedy: str = CORRECT,
) -> list[Any]:
    """`read(value)` of every value; BadInputError lists the places where it raises ValueError."""
    found, bad = [], []
    for place, value in zip(places, values, strict=True):
        try:
            found.append(read(value))
        except ValueError as error:
            bad.append(f"{place}: {error}")
    refuse_rows(where, bad, expected, remedy)
    return found


@dataclass(frozen=True)
class Rows:
    """The rows of a data set."""

    where: str  # the file, folder or Hub id
    data: Any  # column -> values, or a `datasets.Dataset`
    places: Sequence[str]  # where a person finds each row: "line 7" of a text file

    @property
    def columns(self) -> list[str]:
        """The columns' names."""
        return list(getattr(self.data, "column_names", self.data))

    def find_columns(
        self, named: Sequence[str] | None, usual: Sequence[Sequence[str]], what: str, option: str
    ) -> tuple[str, ...]:
        """The columns that the user named, else the first of `usual` that are all there."""
        wanted = [named] if named else usual
        for names in wanted:
            if set(names) <= set(self.columns):
                return tuple(names)
        raise UsageError(
            self.where,
            expected=f"{what}: " + " or ".join("+".join(names) for names in wanted),
            found=f"columns {', '.join(self.columns)}",
            remedy=f"name the column with {option}",
        )

    def class_names(self, column: str) -> tuple[str, ...]:
        """The names of the classes, where the data set has them (`ClassLabel`); else ()."""
        feature = getattr(self.data, "features", {}).get(column)
        return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())

    def column(self, name: str) -> list[Any]:
        """The values of a column; None where a row lacks it. Images are not decoded.

        Numbers of a `ClassLabel` become its names: each data set numbers its classes by itself.
        """
        self.find_columns([name], (), "a column", "--text-column or --label-column")
        feature: Any = getattr(self.data, "features", {}).get(name)
        data, names = self.data, self.class_names(name)
        if type(feature).__name__ == "Image":
            data = data.cast_column(name, type(feature)(decode=False))

        def named(value: Any) -> Any:
            if isinstance(value, list):
                return [named(one) for one in value]
            is_class = isinstance(value, int) and 0 <= value < len(names)  # -1: no label
            return names[value] if is_class else value

        return [named(value) for value in data[name]] if names else list(data[name])

    def read(
        self, columns: Sequence[str], read: Callable[[tuple[Any, ...]], Any], expected: str
    ) -> list[Any]:
        """`read(cells)` of every row; all rows where it raises ValueError are listed."""
        cells = zip(*(self.column(name) for name in columns), strict=True)
        return read_each(self.where, self.places, cells, read, expected)


def load_rows(source: str, *, split: str = "train", images: bool = False) -> Rows:
    """Load the rows of a file, of a folder (of images) or of a Hub id."""
    path, suffix = Path(source), Path(source).suffix.lower()
    options: dict[str, str | None]
    if path.is_dir():
        options = {"path": "imagefolder", "data_dir": source} if images else {"path": source}
    elif not path.exists() and HUB_ID.fullmatch(source) and path.suffix not in ENDINGS:
        name, _, config = source.partition(":")
        options = {"path": name, "name": config or None}
    else:
        os.close(open_regular(source))
        if suffix not in ENDINGS:
            raise UsageError(
                source,
                expected=f"a file that ends in {', '.join(ENDINGS)}",
                found=repr(suffix) if suffix else "no ending",
                remedy="rename it to what it is",
            )
        if suffix != PARQUET:
            return _read_text(source, suffix)
        _check_parquet(source)
        options = {"path": "parquet", "data_files": source}
    dataset = _load_dataset(source, options, split)
    if not len(dataset):
        raise _no_rows(source)
    return Rows(source, dataset, [f"row {i + 1}" for i in range(len(dataset))])


def _no_rows(source: str) -> BadInputError:
    return BadInputError(source, expected="rows", found="none", remedy="give another file")


def _read_text(source: str, suffix: str) -> Rows:
    """The rows of a text file; BadInputError lists every line that is none."""
    bad: list[str] = []
    columns: dict[str, list[Any]] = {}
    places: list[str] = []
    read = _read_table if suffix in TABLES else _read_json_lines
    for number, record in read(source, bad):
        for name in [name for name in record if name not in columns]:
            columns[name] = [None] * len(places)
        for name, values in columns.items():
            values.append(record.get(name))
        places.append(f"line {number}")
    what = "the header's columns" if suffix in TABLES else "one JSON object per line"
    refuse_rows(source, bad, f"rows of UTF-8 text with {what}")
    if not places:
        raise _no_rows(source)
    return Rows(source, columns, places)


def _text_lines(source: str, bad: list[str]) -> Iterator[tuple[int, str]]:
    with open(open_regular(source), "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad.append(f"line {number}: bytes that are not UTF-8 at offset {error.start}")


def _read_table(source: str, bad: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(last line, cells by column) of every row of a tsv or csv file."""
    tabs = Path(source).suffix.lower() == ".tsv"
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for number, text in _text_lines(source, bad):  # noqa: B007 - read outside
            yield text

    names: list[str] = []
    csv.field_size_limit(1 << 30)
    try:
        for cells in csv.reader(lines(), strict=True, **style):
            if cells and not names:
                names = [name.strip() for name in cells]
                if len(set(names)) != len(names) or not all(names):
                    found = f"line {number}: {names}"
                    raise BadInputError(source, expected="columns with names", found=found)
            elif len(cells) == len(names):
                yield number, dict(zip(names, cells, strict=True))
            elif cells:
                bad.append(f"line {number}: {len(cells)} columns, the header has {len(names)}")
    except csv.Error as error:
        bad.append(f"line {number}: not CSV: {error}")


def _read_json_lines(source: str, bad: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _text_lines(source, bad):
        try:
            record = strict_json.loads(line, source) if line.strip() else None
        except BadInputError as error:
            bad.append(f"line {number}: {error.found}")
            continue
        if isinstance(record, dict):
            yield number, record
        elif line.strip():
            bad.append(f"line {number}: {type(record).__name__}, not an object")


def _check_parquet(source: str) -> None:
    """Refuse what a file claims, before anything is allocated for it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        claims = pq.read_metadata(source)
        size = sum(claims.row_group(i).total_byte_size for i in range(claims.num_row_groups))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInputError(source, expected="a parquet file", found=first_line(error)) from error
    # Equal values take hardly any room: a few KB may claim millions of rows.
    most = min(MAX_ROWS, max(1_000_000, 10 * os.path.getsize(source)))
    most_bytes = min(MAX_PARQUET_BYTES, max(1 << 26, 200 * os.path.getsize(source)))
    if not 0 <= claims.num_rows <= most or size > most_bytes:
        raise BadInputError(
            source,
            expected=f"at most {most} rows and {most_bytes} bytes",
            found=f"a claim of {claims.num_rows} rows and {size} bytes",
        )


def _load_dataset(source: str, options: dict[str, Any], split: str) -> Any:
    """One split of a data set; nothing of a local one stays in the cache of `datasets`."""
    import datasets

    local = os.path.exists(source)
    level, shown = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            where = {"cache_dir": folder, "keep_in_memory": True} if local else {}
            found = datasets.load_dataset(**options, **where)
            names = (split,) if split == "train" else ("validation", "test", "train")
            return found[next((name for name in names if name in found), next(iter(found)))]
    except MemoryError:
        raise
    except Exception as error:  # of many kinds: pyarrow's, the Hub's and the builders'
        if "corresponds to no data" in str(error):
            raise _no_rows(source) from error
        cause: BaseException = error
        while local and (cause.__cause__ or cause.__context__) is not None:
            cause = cause.__cause__ or cause.__context__ or cause
        file = os.path.isfile(source)
        raise (BadInputError if local else FileAccessError)(
            source,
            expected="a parquet file" if file else "a data set",
            found=first_line(cause),
            remedy="check it"
            if local
            else "no such file is here; for a data set of the Hub check the id and the network "
            "(HF_HUB_OFFLINE uses what was loaded before)",
        ) from error
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
