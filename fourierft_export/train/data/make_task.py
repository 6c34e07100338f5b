"""From settings to a `TrainingTask`: one entry for every task and for factories of modules."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import FourierFTError, UsageError
from ...models.task import ALIASES
from ..settings import DataSettings, TrainSettings
from ..task import TrainingTask
from . import losses_and_scores as scores
from .generation import text_generation
from .images import Collate, read_images
from .labels import Labels, label_ids, make_labels, read_labels
from .losses_and_scores import IGNORED
from .models import Row, TextInput, find_model
from .rows import BadRows, load_rows
from .task_inputs import NUMBER, SEVERAL, SINGLE, Source

LENGTH = 256
LABELS = (("label",), ("labels",))
TEXTS = (
    ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("text",), ("sentence",),
)  # fmt: skip
WORDS = (("tokens",), ("words",))
TAGS = (("labels",), ("tags",), ("ner_tags",))
SCORINGS = {SINGLE: scores.CLASSES, SEVERAL: scores.SEVERAL, NUMBER: scores.NUMBERS}


def text_classification(source: Source) -> TrainingTask:
    """A model of one label per row of text, of several, or of a number."""
    label = source.label_column(LABELS)
    lists = isinstance(source.train.column(label)[0], list)
    problem = source.data.problem_type or (SEVERAL if lists else SINGLE)
    known = source.known_classes(label, "text-classification")
    texts = source.read_texts(TEXTS)
    targets, labels = source.read_targets(label, problem, known)
    parts = [list(zip(t, y, strict=True)) for t, y in zip(texts, targets, strict=True)]
    learnt, scored, notes = source.split(*parts)
    names = labels.names if problem != NUMBER else ("value",)
    model, new, head = source.load_classifier("text-classification", names)
    model.config.problem_type = problem
    encoder = TextInput(model, source.directory)
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = encoder.pad_id  # a decoder's head reads the last token before
    length = encoder.row_length(source.settings.max_length, LENGTH)

    def encode(rows: Sequence[tuple[tuple[str, ...], Any]]) -> list[Row]:
        encoded, _ = encoder.encode([texts for texts, _ in rows], length)
        return [row | {"labels": y} for row, (_, y) in zip(encoded, rows, strict=True)]

    rows = encode(learnt)
    full = sum(len(row["input_ids"]) == length for row in rows)
    cut = (f"{full} training rows fill all {length} tokens; what is longer is cut",)
    return source.task(
        model,
        rows,
        scored and encode(scored),
        SCORINGS[problem],
        data_collator=encoder.collate,
        task_type="SEQ_CLS",
        modules_to_save=new,
        notes=(*notes, *head, *(cut if full else ())),
        labels=labels.names,
    )


def token_classification(source: Source) -> TrainingTask:
    """A model of one label per word; the word's first token has it."""
    tags = source.label_column(TAGS)
    known = source.known_classes(tags, "token-classification")
    named = source.data.text_column or ()
    parts: list[list[tuple[list[str], list[int]]]] = []
    labels = Labels()
    for rows in source.both:
        (column,) = rows.find_columns(named, WORDS, "words", "--text-column")
        bad = BadRows(rows.where, "a list of words, and as many labels, in every row")
        sentences: list[list[str]] = []
        flat: list[Any] = []
        places: list[str] = []
        for place, *cells in zip(rows.places, rows.column(column), rows.column(tags), strict=True):
            # In text files a row's words and labels are separated by spaces.
            words, own = (v.split() if isinstance(v, str) else v for v in cells)
            wrong = _wrong_words(words, own)
            if wrong:
                bad.add(place, wrong)
                continue
            sentences.append(words)
            flat += own
            places += [f"{place}, word {n + 1}" for n in range(len(words))]
        bad.check()
        found = read_labels(rows.where, flat, places)
        if rows is source.train:
            labels = make_labels(rows.where, found, known)
        ids = iter(label_ids(rows.where, found, places, labels))
        parts.append([(words, [next(ids) for _ in words]) for words in sentences])
    learnt, scored, notes = source.split(*parts)
    model, new, head = source.load_classifier("token-classification", labels.names)
    encoder = TextInput(model, source.directory, words=True)
    length = encoder.row_length(source.settings.max_length, LENGTH)
    lost = 0

    def encode(rows: Sequence[tuple[list[str], list[int]]]) -> list[Row]:
        nonlocal lost
        encoded, owners = encoder.encode([(words,) for words, _ in rows], length)
        for row, own, (words, ids) in zip(encoded, owners, rows, strict=True):
            row["labels"] = [
                ids[word] if word is not None and word != last else IGNORED
                for word, last in zip(own, [None, *own[:-1]], strict=True)
            ]
            lost += len(words) - sum(label != IGNORED for label in row["labels"])
        return encoded

    encoded, eval_rows = encode(learnt), scored and encode(scored)
    cut = (f"{lost} words lie beyond {length} tokens and do not count",) if lost else ()
    return source.task(
        model,
        encoded,
        eval_rows,
        scores.tags(labels.names),
        data_collator=encoder.collate,
        task_type="TOKEN_CLS",
        modules_to_save=new,
        notes=(*notes, *cut, *head),
        labels=labels.names,
    )


def _wrong_words(words: Any, labels: Any) -> str | None:
    """Why a row cannot be used, if so."""
    if not isinstance(words, list) or not words:
        return f"words {words!r:.60}"
    odd = next((w for w in words if not isinstance(w, str) or not w.strip()), None)
    if odd is not None:
        return f"the word {odd!r:.60}"
    if not isinstance(labels, list):
        return f"labels {labels!r:.60}"
    return None if len(labels) == len(words) else f"{len(words)} words and {len(labels)} labels"


def image_classification(source: Source) -> TrainingTask:
    """A model of one label per image; the directory's image processor is used, if it has one."""
    label = source.label_column(LABELS)
    known = source.known_classes(label, "image-classification")
    images = [read_images(rows, source.data.text_column or ()) for rows in source.both]
    targets, labels = source.read_targets(label, SINGLE, known)
    parts = [list(zip(x, y, strict=True)) for x, y in zip(images, targets, strict=True)]
    learnt, scored, notes = source.split(*parts)
    model, saved, head = source.load_classifier("image-classification", labels.names)
    return source.task(
        model,
        learnt,
        scored,
        scores.CLASSES,
        data_collator=Collate(source.directory, model),
        modules_to_save=saved,
        notes=(*notes, *head),
        labels=labels.names,
    )


# What makes a task, and the options that it does not use.
TASKS: dict[str, tuple[Callable[[Source], TrainingTask], tuple[str, ...]]] = {
    "text-classification": (text_classification, ("pack",)),
    "token-classification": (token_classification, ("pack", "problem_type")),
    "image-classification": (image_classification, ("pack", "problem_type", "max_length")),
    "text-generation": (text_generation, ("problem_type", "label_column")),
}
UNUSED_BY_MODULES = (
    *("model", "task", "data", "eval", "text_column", "label_column"),
    *("problem_type", "pack", "max_length", "max_train_rows"),
)


def prepare(data: DataSettings, settings: TrainSettings) -> TrainingTask:
    """The model to train and its rows; bad rows and options without use here are errors."""
    name = ALIASES.get(data.task or "", data.task or "none")
    make, unused = TASKS.get(name, (None, UNUSED_BY_MODULES))
    if make is None and data.module is None:
        raise UsageError("task", expected=" or ".join(TASKS), found=name, remedy="give --task")
    for option, what in (("model", "a model to train"), ("data", "rows to learn from")):
        if getattr(data, option) is None and data.module is None:
            raise UsageError(option, expected=what, found="none", remedy=f"give --{option}")
    given, unused = vars(data) | vars(settings), UNUSED_BY_MODULES if data.module else unused
    wrong = ", ".join(f"--{name.replace('_', '-')}" for name in unused if given[name])
    if wrong:
        by = "--module, which brings a whole task," if data.module else f"--task {name}"
        raise UsageError(wrong, expected=f"options that {by} uses", remedy="leave it out")
    if data.module is not None or make is None:
        return call_factory(data.module or "")
    columns = data.text_column or ()
    most = 2 if name == "text-classification" else 1
    if len(columns) > most:
        found = ", ".join(map(repr, columns))
        raise UsageError("text_column", expected=f"at most {most}", found=found)
    directory, images = find_model(str(data.model)), name == "image-classification"
    train = load_rows(str(data.data), images=images)
    scored = data.eval and load_rows(data.eval, split="eval", images=images)
    return make(Source(train, scored or None, directory, data, settings))


def call_factory(spec: str) -> TrainingTask:
    """Import "package.module:factory" and call the factory without arguments."""
    path, colon, name = spec.partition(":")
    if not (path and colon and name):
        raise UsageError(
            "module", expected="package.module:factory", found=repr(spec), remedy="name both"
        )
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    # What a user's own code raises may be anything; its traceback stays with the cause.
    try:
        importlib.invalidate_caches()
        factory: Any = importlib.import_module(path)
        for part in name.split("."):
            factory = getattr(factory, part)
        made = factory() if callable(factory) else factory
        task = TrainingTask(**made) if isinstance(made, Mapping) else made
    except FourierFTError:
        raise
    except Exception as error:
        raise UsageError(
            f"module {spec}",
            expected="a factory that can be imported and called without arguments",
            found=f"{type(error).__name__}: {error}",
            remedy="correct it (--debug shows where it failed)",
        ) from error
    if not isinstance(task, TrainingTask) or not isinstance(task.model, nn.Module):
        raise UsageError(
            f"module {spec}",
            expected="a factory that returns a TrainingTask, or a mapping with model and "
            "train_dataset",
            found=type(task).__name__,
            remedy="see samples/training/digits_task.py",
        )
    return task
