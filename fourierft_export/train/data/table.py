"""A data file as named columns, and the complaints about its rows.

Formats differ in what they can hold; what the tasks need of them is the same: a few columns, and
for every row the place where a person finds it again. All bad rows are told at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import BadInputError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Rows of a file, column by column.

    Attributes:
        path: the file or folder.
        columns: name -> one value per row; None where a row lacks it.
        places: where each row is, such as "line 7".
    """

    path: str
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]

    def __len__(self) -> int:
        return len(self.places)

    def column(self, name: str, option: str) -> Sequence[Any]:
        """The values of a column.

        Raises:
            BadInputError: there is none of this name; `option` says how to name another.
        """
        if name not in self.columns:
            raise BadInputError(
                self.path,
                expected=f"a column {name!r}",
                found=f"columns {', '.join(self.columns)}",
                remedy=f"name the column with {option}",
            )
        return self.columns[name]


class Complaints:
    """What is wrong with a file's rows, collected, to be raised once."""

    def __init__(self, path: str | os.PathLike[str], expected: str, remedy: str = "") -> None:
        self.path, self.expected, self.remedy = path, expected, remedy
        self.lines: list[str] = []

    def add(self, place: str, what: str) -> None:
        """One row is bad: `what` was found at `place`."""
        self.lines.append(f"{place}: {what}")

    def check(self) -> None:
        """Raise if there were complaints.

        Raises:
            BadInputError: with the first one as what was found, and all of them listed.
        """
        if not self.lines:
            return
        many = len(self.lines) > 1
        raise BadInputError(
            self.path,
            expected=self.expected,
            found=f"{len(self.lines)} bad rows, first {self.lines[0]}" if many else self.lines[0],
            remedy=self.remedy or "correct or remove them",
            offenders=self.lines if many else (),
        )


def not_empty(table: Table) -> Table:
    """`table`, which must hold rows.

    Raises:
        BadInputError: it has none.
    """
    if not len(table):
        raise BadInputError(table.path, expected="rows", found="none", remedy="give another file")
    return table


def brief(value: object) -> str:
    """A value as a person wants to see it in one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_present(
    table: Table, candidates: Sequence[tuple[str, ...]], wanted: str, option: str
) -> tuple[str, ...]:
    """The first of `candidates` whose columns are all there.

    Raises:
        UsageError: none is.
    """
    for names in candidates:
        if all(name in table.columns for name in names):
            return names
    raise UsageError(
        table.path,
        expected=f"{wanted}: " + " or ".join("+".join(names) for names in candidates),
        found=f"columns {', '.join(table.columns)}",
        remedy=f"name the column with {option}",
    )
