"""The tasks of the verb `train`: rows and a model -> a `TrainingTask`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...adapt.targets import SEQUENCE_HEADS
from ...errors import BadInputError
from ...models.load import load_model
from ...models.processor import usable
from ...models.task import get_task
from ..settings import DataSettings, TrainSettings
from ..task import TrainingTask, hold_out
from .images import CORRECT, Collate, read_images
from .labels import class_ids, read_number
from .losses_and_scores import IGNORED, scoring
from .models import known_classes, load_classifier, usual_targets
from .rows import Rows, read_each
from .text import IDS, Row, TextInput

LENGTH, GENERATION_LENGTH = 256, 512
SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"
LABELS = (("label",), ("labels",))
TEXTS = (
    ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("text",), ("sentence",),
)  # fmt: skip
WORDS = (("tokens",), ("words",))
TAGS = (("labels",), ("tags",), ("ner_tags",))
IMAGES = (("image",), ("images",), ("path",), ("file_name",))
Encoded = tuple[list[Any], Any, tuple[str, ...]]  # sets of rows, a collator, notes


@dataclass(frozen=True)
class Source:
    """Where a task comes from: its rows, and the model's directory."""

    name: str
    sets: list[Rows]  # to learn from, and to score if there are any
    directory: str
    data: DataSettings
    settings: TrainSettings

    @property
    def dtype(self) -> str | None:
        """What to load the model in: autocast works on any dtype, and is better not widened."""
        return "float32" if self.settings.dtype == "float32" else None

    def find_columns(self, usual: Sequence[Sequence[str]], what: str) -> tuple[str, ...]:
        """The columns of what is learnt from."""
        return self.sets[0].find_columns(self.data.text_column, usual, what, "--text-column")

    def find_labels(self, usual: Sequence[Sequence[str]]) -> str:
        """The column of labels."""
        named = (self.data.label_column,) if self.data.label_column else ()
        what = "a column of labels"
        return self.sets[0].find_columns(named, usual, what, "--label-column")[0]

    def read_texts(self, usual: Sequence[Sequence[str]]) -> list[list[tuple[str, ...]]]:
        """The texts of every row, one or two, of all sets."""
        columns = self.find_columns(usual, "columns of text")

        def read(texts: tuple[Any, ...]) -> tuple[str, ...]:
            for name, text in zip(columns, texts, strict=True):
                if text is None:
                    raise ValueError(f"no {name}")
                if not isinstance(text, str):
                    raise ValueError(f"{type(text).__name__} {text!r:.60} as {name}")
                if not text.strip():
                    raise ValueError(f"an empty {name}")
            return texts

        return [rows.read(columns, read, "text in every row") for rows in self.sets]

    def read_classes(
        self, column: str, labels: Sequence[Sequence[list[Any]]], least: int = 2
    ) -> tuple[list[list[list[int]]], tuple[str, ...]]:
        """The labels of every row as ids, and the names of the classes."""
        known = self.sets[0].class_names(column) or known_classes(self.directory, self.name)
        return class_ids(self.sets, labels, known, least)

    def split(self, sets: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
        """Rows to learn from and to score, each in the file's order, and notes."""
        learnt, held, notes = hold_out(len(sets[0]), self.settings, len(sets) > 1)
        scored = sets[1] if len(sets) > 1 else [sets[0][i] for i in held]
        return [sets[0][i] for i in learnt], list(scored), notes

    def make_classifier(
        self,
        inputs: Sequence[Sequence[Any]],
        targets: Sequence[Sequence[Any]],
        names: tuple[str, ...],
        encode: Callable[[Any, list[Any], list[Any]], Encoded],
        problem: str = SINGLE,
    ) -> TrainingTask:
        """The task of a model with a head for `names`, and of its encoded rows."""
        pairs = [list(zip(x, y, strict=True)) for x, y in zip(inputs, targets, strict=True)]
        learnt, scored, notes = self.split(pairs)
        head = names or ("value",)
        model, new = load_classifier(
            self.directory, self.name, head, dtype=self.dtype, seed=self.settings.seed
        )
        if new:
            what = f"{len(head)} labels" if len(head) > 1 else "a number"
            notes += (f"new for {what}, and trained whole: {', '.join(new)}",)
        (train_rows, eval_rows), collate, more = encode(model, learnt, scored)
        if not new and self.name == "image-classification":
            # PEFT has no task type that names its head.
            new = tuple(name for name, _ in model.named_children() if name in SEQUENCE_HEADS)
        return self.make_task(
            model, train_rows, eval_rows, collate, problem, (*notes, *more), new, names
        )

    def make_task(
        self,
        model: nn.Module,
        learnt: list[Any],
        scored: list[Any],
        collate: Any,
        kind: str,
        notes: tuple[str, ...],
        new: tuple[str, ...] = (),
        labels: tuple[str, ...] = (),
    ) -> TrainingTask:
        """The task of a model and its encoded rows, learnt and scored by `kind`."""
        lengths = [len(row[IDS]) for row in learnt] if isinstance(learnt[0], dict) else None
        return TrainingTask(
            model=model,
            train_dataset=learnt,
            eval_dataset=scored or None,
            data_collator=collate,
            task_type=get_task(self.name).peft_type,
            modules_to_save=new,
            target_modules=usual_targets(model),
            lengths=lengths,
            notes=notes,
            labels=labels,
            **scoring(kind, labels),
        )


def text_classification(source: Source) -> TrainingTask:
    """A model of one label per row of text, of several, or of a number."""
    column = source.find_labels(LABELS)
    lists = isinstance(source.sets[0].column(column)[0], list)
    problem = source.data.problem_type or (SEVERAL if lists else SINGLE)
    texts = source.read_texts(TEXTS)
    targets: list[list[Any]]
    if problem == "regression":
        names: tuple[str, ...] = ()
        expected = "a finite number in every row"
        targets = [rows.read([column], read_number, expected) for rows in source.sets]
    else:
        several = problem == SEVERAL
        labels = [
            [_as_list(value) if several else [value] for value in rows.column(column)]
            for rows in source.sets
        ]
        ids, names = source.read_classes(column, labels, 1 if several else 2)
        if several:
            count = range(len(names))
            targets = [[[float(i in own) for i in count] for own in part] for part in ids]
        else:
            targets = [[i for (i,) in part] for part in ids]

    def encode(model: Any, *sets: list[Any]) -> Encoded:
        model.config.problem_type = problem
        inputs = TextInput(model, source.settings.max_length, LENGTH, source.directory)
        if getattr(model.config, "pad_token_id", 0) is None:
            model.config.pad_token_id = inputs.pad_id  # a decoder's head reads the token before
        rows = []
        for pairs in sets:
            encoded, _ = inputs.encode([texts for texts, _ in pairs])
            rows.append([r | {"labels": y} for r, (_, y) in zip(encoded, pairs, strict=True)])
        full = sum(len(row[IDS]) == inputs.length for row in rows[0])
        cut = f"{full} training rows fill all {inputs.length} tokens; what is longer is cut"
        return rows, inputs.collate, (cut,) if full else ()

    return source.make_classifier(texts, targets, names, encode, problem)


def _as_list(value: Any) -> list[Any]:
    """The labels of a row: a list, or in text files a text with commas."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def token_classification(source: Source) -> TrainingTask:
    """A model of one label per word; the word's first token has it."""
    column = source.find_labels(TAGS)
    columns = (*source.find_columns(WORDS, "words"), column)
    expected = "a list of words, and as many labels, in every row"
    read = [rows.read(columns, _read_words, expected) for rows in source.sets]
    words = [[words for words, _ in part] for part in read]
    ids, names = source.read_classes(column, [[tags for _, tags in part] for part in read])

    def encode(model: Any, *sets: list[Any]) -> Encoded:
        length, lost, rows = source.settings.max_length, 0, []
        inputs = TextInput(model, length, LENGTH, source.directory, words=True)
        for pairs in sets:
            encoded, owners = inputs.encode([(words,) for words, _ in pairs])
            for row, own, (words, tags) in zip(encoded, owners, pairs, strict=True):
                row["labels"] = [
                    tags[word] if word is not None and word != last else IGNORED
                    for word, last in zip(own, [None, *own[:-1]], strict=True)
                ]
                lost += len(words) - sum(label != IGNORED for label in row["labels"])
            rows.append(encoded)
        cut = f"{lost} words lie beyond {inputs.length} tokens and do not count"
        return rows, inputs.collate, (cut,) if lost else ()

    return source.make_classifier(words, ids, names, encode, "tags")


def _read_words(cells: tuple[Any, ...]) -> tuple[list[str], list[Any]]:
    """The words and labels of a row; in text files they are separated by spaces."""
    words, labels = (cell.split() if isinstance(cell, str) else cell for cell in cells)
    if not isinstance(words, list) or not words:
        raise ValueError(f"words {words!r:.60}")
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"the word {word!r:.60}")
    if not isinstance(labels, list):
        raise ValueError(f"labels {labels!r:.60}")
    if len(labels) != len(words):
        raise ValueError(f"{len(words)} words and {len(labels)} labels")
    return words, labels


def image_classification(source: Source) -> TrainingTask:
    """A model of one label per image; the directory's image processor is used."""
    label = source.find_labels(LABELS)
    (column,) = source.find_columns(IMAGES, "images")
    images = [read_images(rows, column) for rows in source.sets]
    labels = [[[value] for value in rows.column(label)] for rows in source.sets]
    ids, names = source.read_classes(label, labels)
    targets = [[i for (i,) in part] for part in ids]

    def encode(model: Any, *sets: list[Any]) -> Encoded:
        collate = Collate(source.directory, model)
        # What does not fit the model is found before a run begins.
        with torch.no_grad(), usable("image processor for this model", source.directory, CORRECT):
            model(pixel_values=collate(sets[0][:1])["pixel_values"])
        return list(sets), collate, ()

    return source.make_classifier(images, targets, names, encode)


def text_generation(source: Source) -> TrainingTask:
    """A causal language model and rows to continue: text, or a column of ready `input_ids`."""
    model: Any = load_model(source.directory, source.name, dtype=source.dtype)
    model.config.use_cache = False
    ready = IDS in source.sets[0].columns and not source.data.text_column
    texts = [] if ready else source.read_texts((("text",), ("sentence",)))
    directory, length = None if ready else source.directory, source.settings.max_length
    inputs = TextInput(model, length, GENERATION_LENGTH, directory)
    if ready:
        sets = [_read_ids(rows, inputs.size) for rows in source.sets]
    else:
        end = inputs.tokenizer.eos_token_id
        sets = []
        for some in texts:
            ids = [row[IDS] for row in inputs.encode(some, cut=False)[0]]
            ids = [own if end is None or own[-1:] == [end] else [*own, end] for own in ids]
            sets.append([{IDS: own, "labels": own} for own in ids])
    for rows, part in zip(source.sets, sets, strict=True):
        read_each(
            rows.where,
            rows.places,
            part,
            _check_learnt,
            "two tokens or more in every row, one to be learnt",
        )
    length, pack = inputs.length, source.data.pack
    learnt, scored, notes = source.split(sets)
    train_rows, eval_rows = (_fit_rows(some, length, pack) for some in (learnt, scored))
    if not train_rows:
        raise BadInputError(
            source.sets[0].where,
            expected=f"tokens to learn among the first {length} of a row",
            found="none",
            remedy="give a longer --max-length",
        )
    long = sum(len(row[IDS]) > length for row in (*learnt, *scored))
    if pack:
        notes += (f"{len(learnt)} texts are packed into {len(train_rows)} rows of {length} tokens",)
    elif long:
        notes += (f"{long} rows are longer than {length} tokens and were cut",)
    return source.make_task(model, train_rows, eval_rows, inputs.collate, "next tokens", notes)


def _read_ids(rows: Rows, size: int) -> list[Row]:
    """Rows of ready token ids; labels are the same, unless a column gives them."""

    def read(cells: tuple[Any, ...]) -> Row:
        ids, labels = cells[0], cells[0] if cells[1] is None else cells[1]
        if not _are_ids(ids, range(size)):
            raise ValueError(f"input_ids {ids!r:.60}")
        if not _are_ids(labels, range(IGNORED, size)) or len(labels) != len(ids):
            raise ValueError(f"labels {labels!r:.60}")
        return {IDS: ids, "labels": labels}

    columns = (IDS, "labels" if "labels" in rows.columns else IDS)
    return rows.read(columns, read, f"lists of token ids below {size}, and as many labels")


def _are_ids(value: Any, allowed: range) -> bool:
    return isinstance(value, list) and all(type(i) is int and i in allowed for i in value)


def _check_learnt(row: Row) -> None:
    """Refuse a row whose labels, the first aside, do not count."""
    if set(row["labels"][1:]) <= {IGNORED}:
        raise ValueError(f"{len(row[IDS])} tokens, none to be learnt")


def _fit_rows(rows: Sequence[Row], length: int, pack: bool) -> list[Row]:
    """Rows of at most `length` tokens that have some to learn."""
    if pack:
        joined = {name: [i for row in rows for i in row[name]] for name in (IDS, "labels")}
        starts = range(0, len(joined[IDS]), length)
        rows = [{name: ids[at : at + length] for name, ids in joined.items()} for at in starts]
    # The first label never counts: nothing stands before it.
    cut = [{IDS: row[IDS][:length], "labels": [IGNORED, *row["labels"][1:length]]} for row in rows]
    return [row for row in cut if any(label != IGNORED for label in row["labels"])]
