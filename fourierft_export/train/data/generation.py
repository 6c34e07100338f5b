"""text-generation: rows of text, or of ready token ids, to continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import BadInputError
from ..task import TrainingTask
from . import models, scores
from .models import Row, TextEncoder
from .rows import BadRows, Rows
from .scores import IGNORED
from .split import split
from .text import IDS, TEXTS, Source

LENGTH = 512


def text_generation(source: Source) -> TrainingTask:
    """A causal language model and rows to continue: text, or a column of ready `input_ids`."""
    model = models.load_generator(source.directory, dtype=source.dtype)
    longest = source.settings.max_length
    if IDS in source.train.columns and not source.data.text_column:
        pad = models.Pad(0, mask="attention_mask" in models.text_inputs(model))
        length = models.row_length(longest, LENGTH, models.positions(model))
        parts = [_ready_ids(rows, models.vocabulary(model)) for rows in source.both()]
    else:
        encoder = TextEncoder(source.directory, model)
        pad = encoder.pad()
        length = models.row_length(longest, LENGTH, encoder.limit)
        texts = source.read_texts(TEXTS)
        parts = [
            _encode_texts(rows, found, encoder)
            for rows, found in zip(source.both(), texts, strict=True)
        ]
    learnt, scored, notes = split(parts, source.settings)
    train_rows, long = _fit_rows(learnt, length, source.data.pack)
    eval_rows, too_long = _fit_rows(scored or (), length, source.data.pack)
    if long + too_long:
        notes += (f"{long + too_long} rows are longer than {length} tokens and were cut",)
    if not train_rows:
        raise BadInputError(
            source.train.where,
            expected=f"tokens to learn among the first {length} of a row",
            found="none",
            remedy="give a longer --max-length",
        )
    if source.data.pack:
        notes += (f"{len(learnt)} texts are packed into {len(train_rows)} rows of {length} tokens",)
    return TrainingTask(
        model=model,
        train_dataset=train_rows,
        eval_dataset=eval_rows or None,
        data_collator=pad,
        compute_loss_func=scores.next_token_loss,
        compute_metrics=scores.score_text,
        preprocess_logits_for_metrics=scores.keep_sums,
        task_type="CAUSAL_LM",
        target_modules=models.usual_targets(model),
        lengths=[len(row[IDS]) for row in train_rows],
        notes=notes,
    )


def _encode_texts(rows: Rows, texts: Sequence[tuple[str, ...]], encoder: TextEncoder) -> list[Row]:
    encoded, _ = encoder.encode(texts, None)
    end = encoder.tokenizer.eos_token_id
    found = []
    for row in encoded:
        ids = list(row[IDS])
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        found.append({IDS: ids, "labels": ids})
    return _check_rows(rows, found)


def _ready_ids(rows: Rows, size: int | None) -> list[Row]:
    bad = BadRows(rows.where, f"lists of token ids below {size}, and as many labels")
    found: list[Row] = []
    targets = rows.column("labels") if "labels" in rows.columns else [None] * len(rows)
    for i, (ids, labels) in enumerate(zip(rows.column(IDS), targets, strict=True)):
        if not _are_ids(ids, 0, size):
            bad.add(rows.place(i), f"input_ids {ids!r:.60}")
        elif labels is not None and not (
            _are_ids(labels, IGNORED, size) and len(labels) == len(ids)
        ):
            bad.add(rows.place(i), f"labels {labels!r:.60}")
        else:
            found.append({IDS: ids, "labels": ids if labels is None else labels})
    bad.check()
    return _check_rows(rows, found)


def _are_ids(value: Any, least: int, size: int | None) -> bool:
    allowed = range(least, size or 1 << 31)
    return isinstance(value, list) and all(type(i) is int and i in allowed for i in value)


def _check_rows(rows: Rows, found: list[Row]) -> list[Row]:
    """Raise BadInputError with all rows that have no token to predict."""
    bad = BadRows(rows.where, "two tokens or more in every row, one to be learnt")
    for i, row in enumerate(found):
        if all(label == IGNORED for label in row["labels"][1:]):
            bad.add(rows.place(i), f"{len(row[IDS])} tokens, none to be learnt")
    bad.check()
    return found


def _fit_rows(rows: Sequence[Row], length: int, pack: bool) -> tuple[list[Row], int]:
    """Rows of at most `length` tokens that have some to learn, and how many were cut."""
    lost = 0 if pack else sum(len(row[IDS]) > length for row in rows)
    if pack:
        joined = {name: [i for row in rows for i in row[name]] for name in (IDS, "labels")}
        starts = range(0, len(joined[IDS]), length)
        rows = [{name: ids[at : at + length] for name, ids in joined.items()} for at in starts]
    # The first label never counts: nothing stands before it.
    cut = [{IDS: row[IDS][:length], "labels": [IGNORED, *row["labels"][1:length]]} for row in rows]
    return [row for row in cut if any(label != IGNORED for label in row["labels"])], lost
