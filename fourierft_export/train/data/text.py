"""text-classification: one or two texts per row, one label."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..task import TrainingTask
from .labels import Labels, label_ids, make_labels, read_labels
from .loading import known_classes, load_classifier, usual_targets
from .losses import classify, score_classes
from .probe import count_classes
from .rows import read_table
from .split import SplitSettings, split
from .table import Complaints, Table, brief, first_present
from .tokens import Row, TextEncoder

KIND = "text-classification"
USUAL_LENGTH = 256
LABELS = (("label",), ("labels",))
PAIRS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
TEXTS = (("text",), ("sentence",))


@dataclass(frozen=True)
class TextSettings:
    """How rows of text are read.

    Attributes:
        text_columns: one or two names; () for the usual ones.
        label_column: its name; None for the usual ones.
        max_length: tokens per row; None for the usual number, as far as the model can take it.
        pack: causal-lm: fill rows up to max_length with several texts.
    """

    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    max_length: int | None = None
    pack: bool = False


def text_classification(
    directory: str | os.PathLike[str],
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None,
    *,
    settings: TextSettings,
    rows: SplitSettings,
    dtype: str | None = "float32",
    model: nn.Module | None = None,
) -> TrainingTask:
    """A model of one label per row of text.

    Args:
        directory: the model's directory, with its tokenizer.
        data, eval_data: files of rows (`read_table`).
        settings: columns and lengths.
        rows: which rows are used and held out.
        dtype: name of a torch dtype to load in; None keeps the checkpoint's.
        model: taken instead of the directory's.

    Raises:
        BadInputError: bad rows, all listed; a directory that cannot be loaded.
        BaseMismatchError: the model lacks more than a head.
        UsageError: columns that are not there, lengths out of range.
    """
    table = read_table(data)
    columns = text_columns(table, settings.text_columns)
    label = label_column(table, settings.label_column)
    texts = read_texts(table, columns)
    found = read_labels(table, table.column(label, "--label-column"))
    known = known_classes(directory, KIND) if model is None else None
    labels = make_labels(table, found, known)
    scored = None
    if eval_data is not None:
        other = read_table(eval_data)
        other_found = read_labels(other, other.column(label, "--label-column"))
        ids = label_ids(other, other_found, other.places, labels)
        scored = list(zip(read_texts(other, columns), ids, strict=True))
    ids = label_ids(table, found, table.places, labels)
    learnt, scored, notes = split(list(zip(texts, ids, strict=True)), scored, rows)
    new: tuple[str, ...] = ()
    own = model
    if model is None:
        model, new = load_classifier(directory, KIND, labels.names, dtype=dtype, seed=rows.seed)
        notes += head_notes(new, labels)
    encoder = TextEncoder(directory, model)
    config: Any = getattr(model, "config", None)
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = encoder.pad_id  # a decoder's head reads the last token before it
    length = encoder.length(settings.max_length, USUAL_LENGTH)
    train = _encode(encoder, learnt, length)
    full = sum(len(row["input_ids"]) == length for row in train)
    if full:
        notes += (f"{full} training rows fill all {length} tokens; what is longer is cut",)
    if own is not None:
        check_own(own, encoder, train[0], len(labels), axes=2)
    return TrainingTask(
        model=model,
        train=train,
        eval=None if scored is None else _encode(encoder, scored, length),
        collate=encoder.pad(),
        step=classify,
        metrics=score_classes,
        metric="accuracy",
        higher_is_better=True,
        task_type="SEQ_CLS",
        modules_to_save=new,
        target_modules=usual_targets(model),
        lengths=[len(row["input_ids"]) for row in train],
        notes=notes,
        labels=labels.names,
    )


def check_own(model: nn.Module, encoder: TextEncoder, row: Row, labels: int, *, axes: int) -> None:
    """Refuse a model that does not take the row, or has fewer classes than there are labels.

    Raises:
        UsageError: with what it made of the row.
    """
    batch = encoder.pad()([row])
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    count_classes(model, labels, " and ".join(inputs), axes=axes, **inputs)


def text_columns(table: Table, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The one or two columns of text: those asked for, else the usual ones, pairs first."""
    wanted = [asked] if asked else [*PAIRS, *TEXTS]
    return first_present(table, wanted, "columns of text", "--text-column")


def label_column(table: Table, asked: str | None) -> str:
    """The column of labels: the one asked for, else the usual one."""
    wanted = [(asked,)] if asked else LABELS
    return first_present(table, wanted, "a column of labels", "--label-column")[0]


def read_texts(table: Table, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts of every row.

    Raises:
        BadInputError: columns that are not there; empty texts and other values, all listed.
    """
    complaints = Complaints(table.path, "text in every row")
    values = [table.column(name, "--text-column") for name in columns]
    for name, column in zip(columns, values, strict=True):
        for place, text in zip(table.places, column, strict=True):
            if not isinstance(text, str):
                found = "no" if text is None else f"{type(text).__name__} {brief(text)} as"
                complaints.add(place, f"{found} {name}")
            elif not text.strip():
                complaints.add(place, f"an empty {name}")
    complaints.check()
    return list(zip(*values, strict=True))


def head_notes(new: tuple[str, ...], labels: Labels) -> tuple[str, ...]:
    """What to tell of a head that the checkpoint did not have."""
    if not new:
        return ()
    return (f"new for {len(labels)} labels, and trained whole: {', '.join(new)}",)


def _encode(
    encoder: TextEncoder, rows: Sequence[tuple[tuple[str, ...], int]], length: int
) -> list[Row]:
    encoded = encoder.encode([texts for texts, _ in rows], length)
    return [row | {"labels": label} for row, (_, label) in zip(encoded, rows, strict=True)]
