"""text-classification, token-classification and text-generation: rows of text -> a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..settings import DataSettings, TrainSettings
from ..task import TrainingTask
from . import models, scores
from .labels import Labels, label_ids, make_labels, read_labels, read_numbers
from .models import Row, TextEncoder
from .rows import BadRows, Rows
from .scores import IGNORED
from .split import split

LENGTH = 256
LABELS = (("label",), ("labels",))
PAIRS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
TEXTS = (("text",), ("sentence",))
WORDS = (("tokens",), ("words",))
TAGS = (("labels",), ("tags",), ("ner_tags",))
IDS = "input_ids"
SINGLE, SEVERAL, NUMBER = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
LOSSES: dict[str, tuple[Callable[..., Any], Callable[[Any], dict[str, float]], str]] = {
    SINGLE: (scores.class_loss, scores.score_classes, "accuracy"),
    SEVERAL: (scores.several_loss, scores.score_several, "f1"),
    NUMBER: (scores.number_loss, scores.score_numbers, "mse"),
}


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

    def load_classifier(self, task: str, names: Sequence[str]) -> tuple[nn.Module, tuple[str, ...]]:
        """The model with a head for `names`, and the modules that its checkpoint lacks."""
        return models.load_classifier(
            self.directory, task, names, dtype=self.dtype, seed=self.settings.seed
        )

    def read_texts(self, usual: Sequence[Sequence[str]]) -> list[list[tuple[str, ...]]]:
        """The texts of every row, one or two, of both data sets."""
        named = self.data.text_column or ()
        columns = self.train.find_columns(named, usual, "columns of text", "--text-column")
        return [_read_texts(rows, columns) for rows in self.both()]


def text_classification(source: Source) -> TrainingTask:
    """A model of one label per row of text, of several, or of a number."""
    label = source.label_column(LABELS)
    lists = isinstance(source.train.column(label)[0], list)
    problem = source.data.problem_type or (SEVERAL if lists else SINGLE)
    known = source.known_classes(label, "text-classification")
    texts = source.read_texts((*PAIRS, *TEXTS))
    targets, labels = read_targets(source, label, problem, known)
    names = labels.names if problem != NUMBER else ("value",)
    parts = [list(zip(t, y, strict=True)) for t, y in zip(texts, targets, strict=True)]
    learnt, scored, notes = split(parts, source.settings)
    model, new = source.load_classifier("text-classification", names)
    config: Any = model.config
    config.problem_type = problem
    notes += head_notes(new, names)
    encoder = TextEncoder(source.directory, model)
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = encoder.pad_id  # a decoder's head reads the last token before it
    length = models.row_length(source.settings.max_length, LENGTH, encoder.limit)

    def encode(rows: Sequence[tuple[tuple[str, ...], Any]]) -> list[Row]:
        encoded, _ = encoder.encode([texts for texts, _ in rows], length)
        return [row | {"labels": y} for row, (_, y) in zip(encoded, rows, strict=True)]

    train_rows = encode(learnt)
    full = sum(len(row[IDS]) == length for row in train_rows)
    if full:
        notes += (f"{full} training rows fill all {length} tokens; what is longer is cut",)
    loss, metrics, metric = LOSSES[problem]
    return TrainingTask(
        model=model,
        train_dataset=train_rows,
        eval_dataset=None if scored is None else encode(scored),
        data_collator=encoder.pad(),
        compute_loss_func=loss,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=scores.keep_logits,
        metric_for_best_model=metric,
        task_type="SEQ_CLS",
        modules_to_save=new,
        target_modules=models.usual_targets(model),
        lengths=[len(row[IDS]) for row in train_rows],
        notes=notes,
        labels=() if problem == NUMBER else names,
    )


def read_targets(
    source: Source, column: str, problem: str, known: Sequence[str]
) -> tuple[list[list[Any]], Labels]:
    """What the rows' labels are as numbers, and the classes."""
    found: list[list[Any]] = []
    labels = Labels((), {})
    for rows in source.both():
        values, places = rows.column(column), [rows.place(i) for i in range(len(rows))]
        if problem == NUMBER:
            found.append(read_numbers(rows.where, values, places))
            continue
        lists = [_as_list(value) if problem == SEVERAL else [value] for value in values]
        spread = [p for p, some in zip(places, lists, strict=True) for _ in some]
        flat = read_labels(rows.where, (label for some in lists for label in some), spread)
        if rows is source.train:
            labels = make_labels(rows.where, flat, known, least=1 if problem == SEVERAL else 2)
        ids = iter(label_ids(rows.where, flat, spread, labels))
        if problem == SINGLE:
            found.append(list(ids))
        else:
            hits = [{next(ids) for _ in some} for some in lists]
            found.append([[float(i in own) for i in range(len(labels))] for own in hits])
    return found, labels


def _as_list(value: Any) -> list[Any]:
    """The labels of a row: a list, or in text files a text with commas."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _read_texts(rows: Rows, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts of every row."""
    bad = BadRows(rows.where, "text in every row")
    columns = rows.find_columns(columns, (), "columns of text", "--text-column")
    found = list(zip(*(rows.column(name) for name in columns), strict=True))
    for i, texts in enumerate(found):
        for name, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                kind = f"{type(text).__name__} {text!r:.60} as"
                bad.add(rows.place(i), f"{'no' if text is None else kind} {name}")
            elif not text.strip():
                bad.add(rows.place(i), f"an empty {name}")
    bad.check()
    return found


def head_notes(new: tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
    """What to say of a head that the checkpoint did not have."""
    many = f"{len(names)} labels" if len(names) > 1 else "a number"
    return (f"new for {many}, and trained whole: {', '.join(new)}",) if new else ()


def token_classification(source: Source) -> TrainingTask:
    """A model of one label per word; the word's first token has it."""
    tags = source.label_column(TAGS)
    known = source.known_classes(tags, "token-classification")
    parts: list[list[tuple[list[str], list[int]]]] = []
    labels = Labels((), {})
    for rows in source.both():
        sentences, flat, places = _read_words(rows, source.data, tags)
        if rows is source.train:
            labels = make_labels(rows.where, flat, known)
        ids = iter(label_ids(rows.where, flat, places, labels))
        parts.append([(words, [next(ids) for _ in words]) for words in sentences])
    learnt, scored, notes = split(parts, source.settings)
    model, new = source.load_classifier("token-classification", labels.names)
    encoder = TextEncoder(source.directory, model, words=True)
    length = models.row_length(source.settings.max_length, LENGTH, encoder.limit)

    def encode(rows: Sequence[tuple[list[str], list[int]]]) -> tuple[list[Row], int]:
        encoded, owners = encoder.encode([(words,) for words, _ in rows], length, words=True)
        for row, own, (_, ids) in zip(encoded, owners, rows, strict=True):
            row["labels"] = [
                ids[word] if word is not None and word != last else IGNORED
                for word, last in zip(own, [None, *own[:-1]], strict=True)
            ]
        kept = sum(label != IGNORED for row in encoded for label in row["labels"])
        return encoded, sum(len(words) for words, _ in rows) - kept

    train_rows, lost = encode(learnt)
    eval_rows, lost_too = (None, 0) if scored is None else encode(scored)
    if lost + lost_too:
        notes += (f"{lost + lost_too} words lie beyond {length} tokens and do not count",)
    score = scores.ScoreTags(labels.names)
    return TrainingTask(
        model=model,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=encoder.pad(),
        compute_loss_func=scores.class_loss,
        compute_metrics=score,
        preprocess_logits_for_metrics=scores.keep_tags,
        metric_for_best_model="f1" if score.is_bio else "accuracy",
        task_type="TOKEN_CLS",
        modules_to_save=new,
        target_modules=models.usual_targets(model),
        lengths=[len(row[IDS]) for row in train_rows],
        notes=(*notes, *head_notes(new, labels.names)),
        labels=labels.names,
    )


def _read_words(
    rows: Rows, data: DataSettings, tags: str
) -> tuple[list[list[str]], list[Any], list[str]]:
    """Every row's words, and all words' labels and places in one list each."""
    (words,) = rows.find_columns(data.text_column or (), WORDS, "words", "--text-column")
    bad = BadRows(rows.where, "a list of words, and as many labels, in every row")
    sentences: list[list[str]] = []
    found: list[Any] = []
    places: list[str] = []
    columns = (rows.column(words), rows.column(tags))
    for i, (row, labels) in enumerate(zip(*columns, strict=True)):
        # In text files a row's words and labels are separated by spaces.
        row, labels = (v.split() if isinstance(v, str) else v for v in (row, labels))
        wrong = _wrong_words(row, labels)
        if wrong:
            bad.add(rows.place(i), wrong)
            continue
        sentences.append(list(row))
        found += labels
        places += [f"{rows.place(i)}, word {n + 1}" for n in range(len(row))]
    bad.check()
    return sentences, read_labels(rows.where, found, places), places


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
