"""The rows of the comparison: one draw per task, split for the search of rates."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

TASKS = {  # name -> the file of rows that are reported on
    "sst2": "dev.tsv",
    "subj": "test.tsv",
    "trec": "test.tsv",
    "mpqa": "test.tsv",
    "cola": "dev.tsv",
    "rte": "dev.tsv",
}
DRAW = 2024  # seed of the draw of training rows; every method and seed gets the same
SEARCH_SHARE = 0.2  # of the training rows: scored during the search, learnt from afterwards


@dataclass(frozen=True)
class Rows:
    """Files (TSV with a header line) of one task."""

    search_train: Path
    search_score: Path
    train: Path
    test: Path


def write_rows(source: Path, task: str, out: Path, *, rows: int, scored: int | None) -> Rows:
    """Draw and split one task's rows.

    Args:
        source: the folder that holds a folder for each task.
        task: one of `TASKS`.
        out: folder for the four files.
        rows: training rows to draw.
        scored: at most so many rows to report on; None for all.
    """
    head, *lines = _lines(source / task / "train.tsv")
    drawn = random.Random(DRAW).sample(lines, min(rows, len(lines)))
    held = round(len(drawn) * SEARCH_SHARE)
    test_head, *test = _lines(source / task / TASKS[task])
    if test_head != head:
        raise ValueError(f"{task}: columns {test_head!r} to report on, {head!r} to learn from")
    if scored is not None and len(test) > scored:
        test = random.Random(DRAW).sample(test, scored)
    folder = out / task
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "search_train": drawn[held:],
        "search_score": drawn[:held],
        "train": drawn,
        "test": test,
    }
    for name, part in parts.items():
        (folder / f"{name}.tsv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")
    return Rows(**{name: folder / f"{name}.tsv" for name in parts})


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]
