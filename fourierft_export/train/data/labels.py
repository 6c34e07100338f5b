"""Labels of data files -> class ids and the names that they stand for, or numbers."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...errors import BadInputError
from .losses_and_scores import IGNORED
from .rows import Rows, read_each

Label = str | int
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}\Z")


def read_label(value: Any) -> Label:
    """A label as an integer or as text."""
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if _INTEGER.match(text) else text
    if value is None or isinstance(value, str):
        raise ValueError("no label")
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # numpy's integers too
    except TypeError:
        pass
    raise ValueError(f"label {value!r:.60}")


def read_number(cells: tuple[Any, ...]) -> float:
    """The number that a regression learns from a row."""
    (value,) = cells
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r:.60}")
    # The Trainer counts no label of -100: the next float32 stands for this number.
    return float(np.nextafter(np.float32(IGNORED), 0)) if number == IGNORED else number


def class_ids(
    sets: Sequence[Rows], labels: Sequence[Sequence[list[Any]]], known: Sequence[str], least: int
) -> tuple[list[list[list[int]]], tuple[str, ...]]:
    """The labels of every row as ids, and the classes' names by id.

    Args:
        sets: the rows to learn from, which say what classes there are, and those to score.
        labels: of every row of each set, a list.
        known: names of the classes that the data set or the model has already.
        least: so many classes are needed.
    """
    ids: Mapping[Label, int] = {}
    names: tuple[str, ...] = ()
    found = []
    for rows, lists in zip(sets, labels, strict=True):
        places = [
            f"{place}, label {n}" if len(own) > 1 else place
            for place, own in zip(rows.places, lists, strict=True)
            for n in range(1, len(own) + 1)
        ]
        values = [label for own in lists for label in own]
        expected = "labels that are integers or text"
        flat = read_each(rows.where, places, values, read_label, expected)
        _check_one_kind(rows.where, places, flat)
        if rows is sets[0]:
            names, ids = _name_classes(rows.where, flat, known, least)
        expected = f"labels of the training rows ({', '.join(map(repr, list(ids)[:20]))})"
        remedy = "correct these rows, or train on rows that have these labels"
        numbers = iter(
            read_each(rows.where, places, flat, partial(_find_id, ids), expected, remedy)
        )
        found.append([[next(numbers) for _ in own] for own in lists])
    return found, names


def _find_id(ids: Mapping[Label, int], label: Label) -> int:
    if label not in ids:
        raise ValueError(f"label {label!r:.60}, which no training row has")
    return ids[label]


def _check_one_kind(where: str, places: Sequence[str], labels: Sequence[Label]) -> None:
    """Refuse labels of which some are text and some are integers."""
    texts = sum(isinstance(label, str) for label in labels)
    rarer = str if texts * 2 <= len(labels) else int

    def check(label: Label) -> None:
        if 0 < texts < len(labels) and isinstance(label, rarer):
            raise ValueError(f"label {label!r:.60}")

    expected = "labels that are all integers or all text"
    read_each(where, places, labels, check, expected, "write all in one way")


def _name_classes(
    where: str, labels: Sequence[Label], known: Sequence[str], least: int
) -> tuple[tuple[str, ...], Mapping[Label, int]]:
    """The classes' names by id, some perhaps without a row, and the id of every label."""
    distinct = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    ids: dict[Label, int] = {name: i for i, name in enumerate(known)}
    if known and all(isinstance(n, int) and 0 <= n < len(known) for n in distinct):
        ids = {i: i for i in range(len(known))}
    if known and ids.keys() >= set(distinct):
        return tuple(known), {label: ids[label] for label in distinct}
    if len(distinct) < least:
        raise BadInputError(
            where,
            expected="at least two different labels",
            found=f"only {distinct[0]!r:.60}" if distinct else "none",
            remedy="check the label column",
        )
    numbers = [label for label in distinct if isinstance(label, int)]
    if numbers and numbers[0] >= 0 and numbers[-1] < 2 * len(numbers):
        return tuple(map(str, range(numbers[-1] + 1))), {n: n for n in numbers}
    return tuple(map(str, distinct)), {label: i for i, label in enumerate(distinct)}
