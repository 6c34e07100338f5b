"""Data files, folders and Hub ids -> columns of rows, through `datasets.load_dataset`."""

from __future__ import annotations

import csv
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import BadInputError, FileAccessError, UsageError, missing_extra
from ...files import strict_json
from ...files.container import open_regular

BUILDERS = {
    ".tsv": "csv",
    ".csv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
MAX_ROWS = 100_000_000
MAX_PARQUET_BYTES = 64 << 30  # of its columns, uncompressed


class BadRows:
    """What is wrong with the rows of a file, collected, to be raised once."""

    def __init__(self, where: str, expected: str, remedy: str = "correct or remove them") -> None:
        self.where, self.expected, self.remedy = where, expected, remedy
        self.lines: list[str] = []

    def add(self, place: str, found: str) -> None:
        """Note that `found` stands at `place`."""
        self.lines.append(f"{place}: {found}")

    def check(self) -> None:
        """Raise BadInputError with all bad rows, if there are any."""
        if self.lines:
            many = len(self.lines) > 1
            first = f"{len(self.lines)} bad rows, first " if many else ""
            raise BadInputError(
                self.where,
                expected=self.expected,
                found=first + self.lines[0],
                remedy=self.remedy,
                offenders=self.lines if many else (),
            )


@dataclass(frozen=True)
class Rows:
    """The rows of a data set.

    Attributes:
        where: the file, folder or Hub id.
        dataset: `datasets.Dataset`.
        suffix: of the file; "" where it is no file.
    """

    where: str
    dataset: Any
    suffix: str = ""

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> list[str]:
        """The columns' names."""
        return list(self.dataset.column_names)

    def column(self, name: str) -> list[Any]:
        """The values of a column, one per row; None where a row lacks it.

        Numbers of a `ClassLabel` become its names: each data set numbers its classes by itself.
        """
        names = self.class_names(name)
        values = list(self.dataset[name])
        return [_name_classes(value, names) for value in values] if names else values

    def undecoded(self, name: str) -> list[Any]:
        """The values of a column of images, as files or bytes rather than pixels."""
        if type(self.dataset.features[name]).__name__ != "Image":
            return self.column(name)
        from datasets import Image

        return list(self.dataset.cast_column(name, Image(decode=False))[name])

    def class_names(self, column: str) -> tuple[str, ...]:
        """The names of the classes, where the data set has them (`ClassLabel`); else ()."""
        feature = self.dataset.features[column]
        inner = getattr(feature, "feature", feature)  # of a list
        return tuple(getattr(inner, "names", None) or ())

    def find_columns(
        self, named: Sequence[str], usual: Sequence[Sequence[str]], what: str, option: str
    ) -> tuple[str, ...]:
        """The columns that the user named, else the first of `usual` that are all there."""
        wanted = [tuple(named)] if named else usual
        for names in wanted:
            if all(name in self.columns for name in names):
                return tuple(names)
        raise UsageError(
            self.where,
            expected=f"{what}: " + " or ".join("+".join(names) for names in wanted),
            found=f"columns {', '.join(self.columns)}",
            remedy=f"name the column with {option}",
        )

    def place(self, row: int) -> str:
        """Where a person finds a row: "line 7" of a text file."""
        lines = self._lines
        return f"line {lines[row]}" if row < len(lines) else f"row {row + 1}"

    @cached_property
    def _lines(self) -> list[int]:
        reader = _LINES.get(self.suffix)
        return [] if reader is None else [number for number, _ in reader(self.where, None)]


def load_rows(source: str, *, split: str = "train", builder: str = "") -> Rows:
    """Load rows with `datasets.load_dataset`; nothing of a local file stays in its cache."""
    path, suffix = Path(source), ""
    options: dict[str, Any]
    if path.is_dir():
        options = {"path": builder or source} | ({"data_dir": source} if builder else {})
    elif not path.exists() and HUB_ID.fullmatch(source) and path.suffix not in BUILDERS:
        name, _, config = source.partition(":")
        options = {"path": name, "name": config or None}
    else:
        os.close(open_regular(source))
        suffix = path.suffix.lower()
        if suffix not in BUILDERS:
            raise UsageError(
                source,
                expected=f"a file that ends in {', '.join(BUILDERS)}",
                found=repr(suffix) if suffix else "no ending",
                remedy="rename it to what it is",
            )
        if not path.stat().st_size:
            raise BadInputError(source, expected="rows", found="an empty file")
        options = {"path": BUILDERS[suffix], "data_files": source} | _check(source, suffix)
    rows = Rows(source, _load(source, suffix, options, split), suffix)
    if not len(rows):
        raise _no_rows(source)
    return rows


def _no_rows(source: str) -> BadInputError:
    return BadInputError(source, expected="rows", found="none", remedy="give another file")


def _load(source: str, suffix: str, options: dict[str, Any], split: str) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise missing_extra(str(error.name), "hf", "reading rows") from None
    local = os.path.exists(source)
    with tempfile.TemporaryDirectory() as folder, _quiet(datasets):
        if local:
            options |= {"cache_dir": folder, "keep_in_memory": True}
        if suffix in (".csv", ".tsv"):  # pandas shifts the columns of rows that are all too long
            _list_bad_lines(source, suffix)
        try:
            found = datasets.load_dataset(**options)
            names = (split,) if split != "eval" else ("validation", "test", "train")
            return found[next((name for name in names if name in found), next(iter(found)))]
        # Errors of many kinds come from pandas, pyarrow, the Hub and the builders.
        except (DatasetsError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if suffix in _LINES:
                _list_bad_lines(source, suffix)
            cause: BaseException = error
            while cause.__cause__ is not None or cause.__context__ is not None:
                cause = cause.__cause__ or cause.__context__ or cause
            lines = str(error if not local else cause).strip().splitlines()
            if "corresponds to no data" in str(error):
                raise _no_rows(source) from error
            raise (BadInputError if local else FileAccessError)(
                source,
                expected=f"a {suffix[1:]} file" if suffix else "a data set",
                found=lines[0] if lines else type(cause).__name__,
                remedy="check the file"
                if local
                else "no such file is here; for a data set of the "
                "Hub check the id and the network (HF_HUB_OFFLINE uses what was loaded before)",
            ) from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keeps progress bars and log lines of `datasets` out of stderr."""
    level, shown = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _check(source: str, suffix: str) -> dict[str, Any]:
    """What a file claims, before anything is allocated for it; options of its builder."""
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            claims = pq.read_metadata(source)
            size = sum(claims.row_group(i).total_byte_size for i in range(claims.num_row_groups))
        except (pa.ArrowException, OSError, ValueError) as error:
            found = (str(error).splitlines() or [""])[0]
            raise BadInputError(source, expected="a parquet file", found=found) from error
        if not 0 <= claims.num_rows <= MAX_ROWS or size > MAX_PARQUET_BYTES:
            raise BadInputError(
                source,
                expected=f"at most {MAX_ROWS} rows and {MAX_PARQUET_BYTES} bytes",
                found=f"a claim of {claims.num_rows} rows and {size} bytes",
            )
    if BUILDERS[suffix] != "csv":
        return {}
    from datasets import Features, Value

    header = next((cells for _, cells in _LINES[suffix](source, None, header=True)), None)
    if header is None:
        raise BadInputError(source, expected="a header line", found="an empty file")
    if len(set(header)) != len(header) or not all(header):
        raise BadInputError(source, expected="columns with names", found=f"line 1: {header}")
    tabs: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    )
    return {
        **tabs,
        "features": Features({name: Value("string") for name in header}),
        "keep_default_na": False,
        "encoding": "utf-8-sig",
        "engine": "c",
        "header": 0,
        "names": header,
        "on_bad_lines": "error",
    }


def _name_classes(value: Any, names: Sequence[str]) -> Any:
    """The names of class numbers, also in lists; other values stay (-1 is a missing label)."""
    if isinstance(value, list):
        return [_name_classes(one, names) for one in value]
    is_class = isinstance(value, int) and 0 <= value < len(names)
    return names[value] if is_class else value


def _list_bad_lines(source: str, suffix: str) -> None:
    """Raise with every line that is not one of its format."""
    expected = (
        "one JSON object per line" if suffix not in (".csv", ".tsv") else "the header's columns"
    )
    bad = BadRows(source, f"rows of UTF-8 text with {expected}")
    for _ in _LINES[suffix](source, bad):
        pass
    bad.check()


def _text_lines(source: str, bad: BadRows | None) -> Iterator[tuple[int, str]]:
    with open(open_regular(source), "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                text = line.decode("utf-8", "replace")
                if bad is not None:
                    bad.add(f"line {number}", f"bytes that are not UTF-8 at offset {error.start}")
                    continue
            yield number, text


def _cells(
    source: str, bad: BadRows | None, *, header: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row of a tsv or csv file, or of the header alone."""
    tabs = Path(source).suffix.lower() == ".tsv"
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    numbers = [0]

    def lines() -> Iterator[str]:
        for number, text in _text_lines(source, bad):
            numbers[0] = number
            yield text

    names: list[str] | None = None
    csv.field_size_limit(1 << 30)
    try:
        for cells in csv.reader(lines(), strict=True, **style):
            if not cells:
                continue
            if names is None:
                names = [name.strip() for name in cells]
                if header:
                    yield numbers[0], names
                    return
                continue
            if bad is not None and len(cells) != len(names):
                found = f"{len(cells)} columns, the header has {len(names)}"
                bad.add(f"line {numbers[0]}", found)
            yield numbers[0], cells
    except csv.Error as error:
        if bad is None:
            raise BadInputError(source, expected="a csv file", found=str(error)) from error
        bad.add(f"line {numbers[0]}", f"not CSV: {error}")


def _json_lines(source: str, bad: BadRows | None) -> Iterator[tuple[int, list[str]]]:
    for number, line in _text_lines(source, bad):
        if not line.strip():
            continue
        yield number, []
        if bad is None:
            continue
        try:
            record = strict_json.loads(line, source)
        except BadInputError as error:
            bad.add(f"line {number}", error.found)
            continue
        if not isinstance(record, dict):
            bad.add(f"line {number}", f"{type(record).__name__}, not an object")


_LINES: dict[str, Callable[..., Iterator[tuple[int, list[str]]]]] = {
    ".tsv": _cells,
    ".csv": _cells,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}


def regular_file_problem(path: str) -> str | None:
    """Why a path is no regular file, if so."""
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except OSError as error:
        return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
