"""causal-lm: rows of text, or of ready token ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import BadInputError
from ..task import TrainingTask
from .loading import load_causal, usual_targets
from .losses import continue_text, score_text
from .rows import read_table
from .scores import IGNORED
from .split import SplitSettings, split
from .table import Complaints, Table, brief, first_present
from .text import TEXTS, TextSettings, read_texts
from .tokens import Pad, Row, TextEncoder, row_length, text_inputs, vocabulary

USUAL_LENGTH = 512
IDS, TARGETS = "input_ids", "labels"


def causal_lm(
    directory: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None,
    *,
    settings: TextSettings,
    rows: SplitSettings,
    dtype: str | None = "float32",
    model: nn.Module | None = None,
) -> TrainingTask:
    """A language model and rows to continue.

    A file with a column `input_ids` is taken as it is; its column `labels`, if there is one, says
    which tokens count (-100: not this one). Text goes through the directory's tokenizer, and ends
    in its end-of-text token where it has one. Every row is a sequence of its own, or with `pack`
    they follow one another in rows of max_length.

    Args:
        directory: the model's directory; None with `model`, for ready ids.
        data, eval_data: files of rows (`read_table`).
        settings: columns and lengths.
        rows: which rows are used and held out.
        dtype: name of a torch dtype to load in; None keeps the checkpoint's.
        model: taken instead of the directory's.

    Raises:
        BadInputError: bad rows, all listed; a directory that cannot be loaded.
        BaseMismatchError: the checkpoint lacks weights.
        UsageError: columns that are not there, lengths out of range.
    """
    table = read_table(data)
    other = None if eval_data is None else read_table(eval_data)
    if model is None:
        model = load_causal(directory or "", dtype=dtype)
    if IDS in table.columns and not settings.text_columns:
        pad = Pad(0, mask="attention_mask" in text_inputs(model))
        found = _ready(table, model)
        scored = None if other is None else _ready(other, model)
        length = row_length(settings.max_length, USUAL_LENGTH, _positions(model))
    else:
        encoder = TextEncoder(directory or "", model)
        pad = encoder.pad()
        length = encoder.length(settings.max_length, USUAL_LENGTH)
        found = _encoded(table, settings, encoder)
        scored = None if other is None else _encoded(other, settings, encoder)
    learnt, scored, notes = split(found, scored, rows)
    train, long = _fit(learnt, length, settings.pack)
    held, also_long = (None, 0) if scored is None else _fit(scored, length, settings.pack)
    if long + also_long:
        notes += (f"{long + also_long} rows are longer than {length} tokens and were cut",)
    if not train:
        raise BadInputError(
            data,
            expected=f"tokens to be learnt among the first {length}",
            found="none in any row",
            remedy="raise --max-length",
        )
    if settings.pack:
        notes += (f"{len(learnt)} texts are packed into {len(train)} rows of {length} tokens",)
    return TrainingTask(
        model=model,
        train=train,
        eval=held,
        collate=pad,
        step=continue_text,
        metrics=score_text,
        metric="loss",
        task_type="CAUSAL_LM",
        target_modules=usual_targets(model),
        lengths=[len(row[IDS]) for row in train],
        notes=notes,
    )


def _positions(model: nn.Module) -> int | None:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _encoded(table: Table, settings: TextSettings, encoder: TextEncoder) -> list[Row]:
    """Every text's ids, uncut: packing loses nothing."""
    asked = settings.text_columns
    wanted = [asked] if asked else TEXTS
    texts = read_texts(table, first_present(table, wanted, "a column of text", "--text-column"))
    end = None if encoder.tokenizer is None else encoder.tokenizer.eos_token_id
    rows = encoder.encode(texts, None)
    for row in rows:
        row.pop("token_type_ids", None)
        if end is not None and row[IDS][-1:] != [end]:
            row[IDS] = [*row[IDS], end]
        row[TARGETS] = row[IDS]
    return _long_enough(table, rows)


def _ready(table: Table, model: nn.Module) -> list[Row]:
    """Rows of input_ids, and of labels where the file has them.

    Raises:
        BadInputError: values that are not lists of the model's ids; all are listed.
    """
    size = vocabulary(model)
    complaints = Complaints(table.path, f"lists of token ids{f' below {size}' if size else ''}")
    ids = table.column(IDS, "--text-column")
    targets = table.columns.get(TARGETS)
    rows: list[Row] = []
    for i, place in enumerate(table.places):
        tokens = _integers(ids[i], range(size or 1 << 31))
        if tokens is None:
            complaints.add(place, f"input_ids {brief(ids[i])}")
            continue
        labels: list[int] | None = tokens
        if targets is not None and targets[i] is not None:
            labels = _integers(targets[i], range(IGNORED, size or 1 << 31))
            if labels is None or len(labels) != len(tokens):
                complaints.add(place, f"labels {brief(targets[i])}")
                continue
        rows.append({IDS: tokens, TARGETS: labels})
    complaints.check()
    return _long_enough(table, rows)


def _integers(value: Any, allowed: range) -> list[int] | None:
    """A list of integers within `allowed`, else None."""
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list) or not all(type(i) is int and i in allowed for i in items):
        return None
    return items


def _long_enough(table: Table, rows: list[Row]) -> list[Row]:
    """`rows`, each of which must have a token to predict.

    Raises:
        BadInputError: rows that have none; all are listed.
    """
    complaints = Complaints(table.path, "two tokens or more in every row, one to be learnt")
    for place, row in zip(table.places, rows, strict=True):
        if all(label == IGNORED for label in row[TARGETS][1:]):
            complaints.add(place, f"{len(row[IDS])} tokens, none to be learnt")
    complaints.check()
    return rows


def _fit(rows: Sequence[Row], length: int, pack: bool) -> tuple[list[Row], int]:
    """Rows of at most `length` tokens that have some to learn, and how many were cut."""
    lost = 0
    if pack:
        joined = {name: [i for row in rows for i in row[name]] for name in (IDS, TARGETS)}
        starts = range(0, len(joined[IDS]), length)
        cut = [{name: ids[at : at + length] for name, ids in joined.items()} for at in starts]
    else:
        lost = sum(len(row[IDS]) > length for row in rows)
        cut = [{name: ids[:length] for name, ids in row.items()} for row in rows]
    return [row for row in cut if any(i != IGNORED for i in row[TARGETS][1:])], lost
