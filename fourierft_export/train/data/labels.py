"""Labels of data files -> class ids, and the names that they stand for.

Integers from 0 up are ids themselves, as long as they fill at least half of the range that they
span; other integers, and strings, become ids in sorted order.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInputError
from .table import Complaints, Table, brief

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}\Z")


@dataclass(frozen=True)
class Labels:
    """The classes of a task.

    Attributes:
        names: by id; some may have no training row.
        ids: every label of the training rows -> its id.
    """

    names: tuple[str, ...]
    ids: Mapping[str | int, int]

    def __len__(self) -> int:
        return len(self.names)


def read_labels(table: Table, values: Sequence[Any]) -> list[str | int]:
    """Every row's label as an integer or as text, all of one kind.

    Args:
        table: where the values come from.
        values: integers, integral text, or other text.

    Raises:
        BadInputError: empty, fractional or other values; integers mixed with text.
    """
    complaints = Complaints(table.path, "labels that are integers or text")
    found: list[str | int] = []
    for place, value in zip(table.places, values, strict=True):
        label = as_label(value)
        if label is None:
            complaints.add(place, "no label" if value in (None, "") else f"label {brief(value)}")
        else:
            found.append(label)
    complaints.check()
    return same_kind(table, found, table.places)


def as_label(value: Any) -> str | int | None:
    """A label as it stands in a file, or None if it cannot be one."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        return int(text) if _INTEGER.match(text) else text or None
    try:
        return operator.index(value)  # numpy's integers too
    except TypeError:
        return None


def same_kind(table: Table, found: list[str | int], places: Sequence[str]) -> list[str | int]:
    """The labels, all integers or all text.

    Raises:
        BadInputError: both occur; those of the rarer kind are listed.
    """
    texts = sum(isinstance(label, str) for label in found)
    if 0 < texts < len(found):
        rarer = str if texts * 2 <= len(found) else int
        complaints = Complaints(
            table.path, "labels that are all integers or all text", "write all in one way"
        )
        for place, label in zip(places, found, strict=True):
            if isinstance(label, rarer):
                complaints.add(place, f"label {brief(label)}")
        complaints.check()
    return found


def make_labels(
    table: Table, found: Sequence[str | int], known: Mapping[str, int] | None = None
) -> Labels:
    """The classes of the training rows.

    Args:
        table: the training file.
        found: its labels.
        known: name -> id of a model whose head is trained already; its classes are kept if every
            label is one of them.

    Raises:
        BadInputError: fewer than two classes.
    """
    distinct = sorted(set(found), key=lambda label: (isinstance(label, str), label))
    if known:
        names = tuple(sorted(known, key=lambda name: known[name]))
        if all(isinstance(label, str) and label in known for label in distinct):
            return Labels(names, {label: known[str(label)] for label in distinct})
        if all(isinstance(label, int) and 0 <= label < len(names) for label in distinct):
            return Labels(names, {label: int(label) for label in distinct})
    if len(distinct) < 2:
        raise BadInputError(
            table.path,
            expected="at least two different labels",
            found=f"only {brief(distinct[0])}" if distinct else "none",
            remedy="check the label column",
        )
    numbers = [label for label in distinct if isinstance(label, int)]
    if numbers and numbers[0] >= 0 and numbers[-1] < 2 * len(numbers):
        return Labels(tuple(map(str, range(numbers[-1] + 1))), {n: n for n in numbers})
    return Labels(tuple(map(str, distinct)), {label: i for i, label in enumerate(distinct)})


def label_ids(
    table: Table, found: Sequence[str | int], places: Sequence[str], labels: Labels
) -> list[int]:
    """The labels as ids.

    Raises:
        BadInputError: labels that no training row has.
    """
    complaints = Complaints(
        table.path,
        f"labels of the training rows ({', '.join(map(brief, list(labels.ids)[:20]))})",
        "correct these rows, or train on rows that have these labels",
    )
    for place, label in zip(places, found, strict=True):
        if label not in labels.ids:
            complaints.add(place, f"label {brief(label)}, which no training row has")
    complaints.check()
    return [labels.ids[label] for label in found]
