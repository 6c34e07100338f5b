"""Labels of data files -> class ids and the names that they stand for, or numbers."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import BadInputError
from .losses_and_scores import IGNORED
from .rows import BadRows

Label = str | int
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}\Z")


@dataclass(frozen=True)
class Labels:
    """The classes of a task."""

    names: tuple[str, ...] = ()  # by id; some may have no training row
    ids: Mapping[Label, int] = field(default_factory=dict)  # of every label of the training rows


def read_labels(where: str, values: Iterable[Any], places: Sequence[str]) -> list[Label]:
    """Labels as integers or as text, all of one kind."""
    bad = BadRows(where, "labels that are integers or text")
    found: list[Label] = []
    for place, value in zip(places, values, strict=True):
        label = _label(value)
        if label is None:
            bad.add(place, "no label" if value in (None, "") else f"label {value!r:.60}")
        else:
            found.append(label)
    bad.check()
    texts = sum(isinstance(label, str) for label in found)
    rarer = str if texts * 2 <= len(found) else int
    bad = BadRows(where, "labels that are all integers or all text", "write all in one way")
    for place, label in zip(places, found, strict=True):
        if 0 < texts < len(found) and isinstance(label, rarer):
            bad.add(place, f"label {label!r:.60}")
    bad.check()
    return found


def _label(value: Any) -> Label | None:
    if isinstance(value, str):
        text = value.strip()
        return int(text) if _INTEGER.match(text) else text or None
    try:
        return None if isinstance(value, bool) else operator.index(value)  # numpy's integers too
    except TypeError:
        return None


def read_numbers(where: str, values: Iterable[Any], places: Sequence[str]) -> list[float]:
    """What a regression learns."""
    bad = BadRows(where, "a finite number in every row")
    found = []
    for place, value in zip(places, values, strict=True):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            bad.add(place, f"{value!r:.60}")
        # The Trainer counts no label of -100: the next float32 stands for this number.
        found.append(float(np.nextafter(np.float32(IGNORED), 0)) if number == IGNORED else number)
    bad.check()
    return found


def make_labels(
    where: str, found: Iterable[Label], known: Sequence[str] = (), *, least: int = 2
) -> Labels:
    """The classes of the training rows; `known` are those of the data set or the model."""
    distinct = sorted(set(found), key=lambda label: (isinstance(label, str), label))
    ids = {name: i for i, name in enumerate(known)}
    if known and all(label in ids for label in distinct):
        return Labels(tuple(known), {label: ids[str(label)] for label in distinct})
    if known and all(isinstance(n, int) and 0 <= n < len(known) for n in distinct):
        return Labels(tuple(known), {label: int(label) for label in distinct})
    if len(distinct) < least:
        raise BadInputError(
            where,
            expected="at least two different labels",
            found=f"only {distinct[0]!r:.60}" if distinct else "none",
            remedy="check the label column",
        )
    numbers = [label for label in distinct if isinstance(label, int)]
    if numbers and numbers[0] >= 0 and numbers[-1] < 2 * len(numbers):
        return Labels(tuple(map(str, range(numbers[-1] + 1))), {n: n for n in numbers})
    return Labels(tuple(map(str, distinct)), {label: i for i, label in enumerate(distinct)})


def label_ids(
    where: str, found: Sequence[Label], places: Sequence[str], labels: Labels
) -> list[int]:
    """The labels as ids."""
    names = ", ".join(map(repr, list(labels.ids)[:20]))
    remedy = "correct these rows, or train on rows that have these labels"
    bad = BadRows(where, f"labels of the training rows ({names})", remedy)
    for place, label in zip(places, found, strict=True):
        if label not in labels.ids:
            bad.add(place, f"label {label!r:.60}, which no training row has")
    bad.check()
    return [labels.ids[label] for label in found]
