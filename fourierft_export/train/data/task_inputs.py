"""What every task of the verb `train` does with its rows, labels and model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...adapt.targets import SEQUENCE_HEADS
from ..settings import DataSettings, TrainSettings
from ..task import TrainingTask, hold_out
from . import models
from .labels import Labels, label_ids, make_labels, read_labels, read_numbers
from .rows import BadRows, Rows

SINGLE, SEVERAL, NUMBER = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


@dataclass(frozen=True)
class Source:
    """Where a task comes from: rows to learn from and to score, and the model's directory."""

    train: Rows
    eval: Rows | None
    directory: str
    data: DataSettings
    settings: TrainSettings

    @property
    def dtype(self) -> str | None:
        """What to load the model in: autocast works on any dtype, and is better not widened."""
        return "float32" if self.settings.dtype == "float32" else None

    @property
    def both(self) -> list[Rows]:
        """The rows to learn from, and those to score if there are any."""
        return [self.train] if self.eval is None else [self.train, self.eval]

    def label_column(self, usual: Sequence[Sequence[str]]) -> str:
        """The column of labels."""
        named = (self.data.label_column,) if self.data.label_column else ()
        return self.train.find_columns(named, usual, "a column of labels", "--label-column")[0]

    def known_classes(self, column: str, task: str) -> tuple[str, ...]:
        """The classes that the data set names, or that the model decides between already."""
        return self.train.class_names(column) or models.known_classes(self.directory, task)

    def read_texts(self, usual: Sequence[Sequence[str]]) -> list[list[tuple[str, ...]]]:
        """The texts of every row, one or two, of both data sets."""
        named, what = self.data.text_column or (), "columns of text"
        columns = self.train.find_columns(named, usual, what, "--text-column")
        found = []
        for rows in self.both:
            rows.find_columns(columns, (), what, "--text-column")
            found.append(list(zip(*(rows.column(name) for name in columns), strict=True)))
            bad = BadRows(rows.where, "text in every row")
            for place, texts in zip(rows.places, found[-1], strict=True):
                for name, text in zip(columns, texts, strict=True):
                    if text is not None and not isinstance(text, str):
                        bad.add(place, f"{type(text).__name__} {text!r:.60} as {name}")
                    elif text is None or not text.strip():
                        bad.add(place, f"no {name}" if text is None else f"an empty {name}")
            bad.check()
        return found

    def read_targets(
        self, column: str, problem: str, known: Sequence[str]
    ) -> tuple[list[list[Any]], Labels]:
        """What the rows' labels are as numbers, and the classes."""
        found: list[list[Any]] = []
        labels = Labels()
        for rows in self.both:
            values = rows.column(column)
            if problem == NUMBER:
                found.append(read_numbers(rows.where, values, rows.places))
                continue
            lists = [_as_list(value) if problem == SEVERAL else [value] for value in values]
            places = [p for p, some in zip(rows.places, lists, strict=True) for _ in some]
            flat = read_labels(rows.where, [label for some in lists for label in some], places)
            if rows is self.train:
                labels = make_labels(rows.where, flat, known, least=1 if problem == SEVERAL else 2)
            ids = iter(label_ids(rows.where, flat, places, labels))
            if problem == SINGLE:
                found.append(list(ids))
            else:
                hits = [{next(ids) for _ in some} for some in lists]
                found.append([[float(i in own) for i in range(len(labels.names))] for own in hits])
        return found, labels

    def split(self, *parts: Sequence[Any]) -> tuple[list[Any], list[Any] | None, tuple[str, ...]]:
        """Rows to learn from and rows to score, each in the file's order; `parts` of `both`."""
        given = list(parts[1]) if len(parts) > 1 else None
        learnt, held, notes = hold_out(len(parts[0]), self.settings, given is not None)
        scored = given or [parts[0][i] for i in held] or None
        return [parts[0][i] for i in learnt], scored, notes

    def load_classifier(
        self, task: str, names: Sequence[str]
    ) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
        """The model with a head for `names`, its modules to save, and what to say of them."""
        model, new = models.load_classifier(
            self.directory, task, names, dtype=self.dtype, seed=self.settings.seed
        )
        if not new and task == "image-classification":  # PEFT has no task type that names its head
            return model, tuple(n for n, _ in model.named_children() if n in SEQUENCE_HEADS), ()
        many = f"{len(names)} labels" if len(names) > 1 else "a number"
        note = f"new for {many}, and trained whole: {', '.join(new)}"
        return model, new, (note,) if new else ()

    def task(
        self,
        model: nn.Module,
        learnt: Sequence[Any],
        scored: Sequence[Any] | None,
        scoring: dict[str, Any],
        **more: Any,
    ) -> TrainingTask:
        """The task of a model and its encoded rows, learnt and scored as `scores` says."""
        text = isinstance(learnt[0], dict)
        return TrainingTask(
            model=model,
            train_dataset=learnt,
            eval_dataset=scored,
            target_modules=models.usual_targets(model),
            lengths=[len(row[models.IDS]) for row in learnt] if text else None,
            **scoring,
            **more,
        )


def _as_list(value: Any) -> list[Any]:
    """The labels of a row: a list, or in text files a text with commas."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
