"""token-classification: one label per word."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..task import TrainingTask
from .labels import as_label, label_ids, make_labels, same_kind
from .loading import known_classes, load_classifier, usual_targets
from .losses import TagWords, score_tags
from .rows import read_table, text_lines
from .scores import IGNORED
from .split import SplitSettings, split
from .table import Complaints, Table, brief, first_present, not_empty
from .text import TextSettings, check_own, head_notes
from .tokens import Row, TextEncoder

KIND = "token-classification"
USUAL_LENGTH = 256
TOKENS = (("tokens",), ("words",))
TAGS = (("labels",), ("tags",), ("ner_tags",))
_CONLL = (".tsv", ".conll", ".txt", ".bio")
_HEADERS = ("token", "tokens", "word", "words")
_BIO = re.compile(r"O|[BI]-.+", re.DOTALL)

Sentence = list[str]


def token_classification(
    directory: str | os.PathLike[str],
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None,
    *,
    settings: TextSettings,
    rows: SplitSettings,
    dtype: str | None = "float32",
    model: nn.Module | None = None,
) -> TrainingTask:
    """A model of one label per word; the word's first token carries it.

    Args:
        directory: the model's directory, with a fast tokenizer.
        data, eval_data: files of rows: lists `tokens` and `labels` (or `tags`), or in text files
            lines of a word and its tag, a blank line after each sentence.
        settings: columns and lengths.
        rows: which rows are used and held out.
        dtype: name of a torch dtype to load in; None keeps the checkpoint's.
        model: taken instead of the directory's.

    Raises:
        BadInputError: bad rows, all listed; a directory that cannot be loaded.
        BaseMismatchError: the model lacks more than a head.
        UsageError: columns that are not there, lengths out of range.
    """
    table = _read(data)
    sentences, found, places = _words(table, settings)
    known = known_classes(directory, KIND) if model is None else None
    labels = make_labels(table, found, known)
    scored = None
    if eval_data is not None:
        other = _read(eval_data)
        other_sentences, other_found, other_places = _words(other, settings)
        ids = label_ids(other, other_found, other_places, labels)
        scored = _pairs(other_sentences, ids)
    ids = label_ids(table, found, places, labels)
    learnt, scored, notes = split(_pairs(sentences, ids), scored, rows)
    new: tuple[str, ...] = ()
    own = model
    if model is None:
        model, new = load_classifier(directory, KIND, labels.names, dtype=dtype, seed=rows.seed)
        notes += head_notes(new, labels)
    encoder = TextEncoder(directory, model, words=True)
    length = encoder.length(settings.max_length, USUAL_LENGTH)
    train, lost = _encode(encoder, learnt, length)
    held, also_lost = (None, 0) if scored is None else _encode(encoder, scored, length)
    if lost + also_lost:
        notes += (f"{lost + also_lost} words lie beyond {length} tokens and do not count",)
    kinds, begins = _bio(labels.names)
    if own is not None:
        check_own(own, encoder, train[0], len(labels), axes=3)
    return TrainingTask(
        model=model,
        train=train,
        eval=held,
        collate=encoder.pad(),
        step=TagWords(kinds, begins),
        metrics=score_tags,
        metric="accuracy" if kinds is None else "f1",
        higher_is_better=True,
        task_type="TOKEN_CLS",
        modules_to_save=new,
        target_modules=usual_targets(model),
        lengths=[len(row["input_ids"]) for row in train],
        notes=notes,
        labels=labels.names,
    )


def _read(path: str | os.PathLike[str]) -> Table:
    return _read_conll(os.fspath(path)) if Path(path).suffix in _CONLL else read_table(path)


def _read_conll(path: str) -> Table:
    """Lines of a word, perhaps more columns, and a tag; blank lines end sentences."""
    complaints = Complaints(path, "a word and its tag on every line")
    tokens: list[list[str]] = []
    tags: list[list[str]] = []
    places: list[str] = []
    inside = False
    for number, line in text_lines(path, complaints):
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or cells[0] == "-DOCSTART-":
            inside = False
        elif number == 1 and cells[0].lower() in _HEADERS:
            continue
        elif len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            complaints.add(f"line {number}", brief(line))
        else:
            if not inside:
                tokens.append([])
                tags.append([])
                places.append(f"line {number}")
                inside = True
            tokens[-1].append(cells[0])
            tags[-1].append(cells[-1].strip())
    complaints.check()
    return not_empty(Table(path, {"tokens": tokens, "tags": tags}, places))


def _words(
    table: Table, settings: TextSettings
) -> tuple[list[Sentence], list[str | int], list[str]]:
    """Every row's words, and all words' labels and places in a line.

    Raises:
        BadInputError: rows that are not two lists of one length; all are listed.
    """
    asked = settings.text_columns
    words = first_present(table, [asked] if asked else TOKENS, "words", "--text-column")[0]
    named = settings.label_column
    tags = first_present(table, [(named,)] if named else TAGS, "labels", "--label-column")[0]
    complaints = Complaints(table.path, "a list of words, and as many labels, in every row")
    sentences: list[Sentence] = []
    found: list[str | int] = []
    places: list[str] = []
    columns = (table.places, table.columns[words], table.columns[tags])
    for place, row, labels in zip(*columns, strict=True):
        wrong = _wrong(row, labels)
        if wrong:
            complaints.add(place, wrong)
            continue
        read = [as_label(label) for label in labels]
        bad = [label for label, value in zip(labels, read, strict=True) if value is None]
        if bad:
            complaints.add(place, f"label {brief(bad[0])}")
            continue
        sentences.append(list(row))
        found += [label for label in read if label is not None]
        places += [f"{place}, word {i + 1}" for i in range(len(row))]
    complaints.check()
    return sentences, same_kind(table, found, places), places


def _wrong(words: object, labels: object) -> str | None:
    """Why a row cannot be used, if so."""
    if not isinstance(words, list) or not words:
        return f"words {brief(words)}"
    odd = next((w for w in words if not isinstance(w, str) or not w.strip()), None)
    if odd is not None:
        return f"the word {brief(odd)}"
    if not isinstance(labels, list):
        return f"labels {brief(labels)}"
    return None if len(labels) == len(words) else f"{len(words)} words and {len(labels)} labels"


def _pairs(sentences: list[Sentence], ids: list[int]) -> list[tuple[Sentence, list[int]]]:
    """Sentences with their words' label ids, from ids in a line."""
    each = iter(ids)
    return [(words, [next(each) for _ in words]) for words in sentences]


def _encode(
    encoder: TextEncoder, rows: Sequence[tuple[Sentence, list[int]]], length: int
) -> tuple[list[Row], int]:
    """Rows of ids and labels, and how many words have no token among them."""
    encoded, words = encoder.encode_words([sentence for sentence, _ in rows], length)
    lost = 0
    for row, owners, (sentence, ids) in zip(encoded, words, rows, strict=True):
        before = [None, *owners[:-1]]
        row["labels"] = [
            ids[word] if word is not None and word != last else IGNORED
            for word, last in zip(owners, before, strict=True)
        ]
        lost += len(sentence) - len({word for word in owners if word is not None})
    return encoded, lost


def _bio(names: Sequence[str]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(kinds, begins) of BIO tags as `TagWords` wants them; None for other tags."""
    if not all(_BIO.fullmatch(name) for name in names) or set(names) <= {"O"}:
        return None, None
    kinds = sorted({name[2:] for name in names if name != "O"})
    ids = {kind: i + 1 for i, kind in enumerate(kinds)}
    return (
        torch.tensor([0 if name == "O" else ids[name[2:]] for name in names]),
        torch.tensor([name.startswith("B-") for name in names]),
    )
