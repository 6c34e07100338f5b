"""text-generation: rows of text, or of ready token ids, to continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import BadInputError
from ..task import TrainingTask
from . import losses_and_scores as scores
from . import models
from .losses_and_scores import IGNORED
from .models import IDS, Row, TextInput
from .rows import BadRows, Rows
from .task_inputs import Source

LENGTH = 512
TEXTS = (("text",), ("sentence",))


def text_generation(source: Source) -> TrainingTask:
    """A causal language model and rows to continue: text, or a column of ready `input_ids`."""
    model = models.load_generator(source.directory, dtype=source.dtype)
    parts = []
    if IDS in source.train.columns and not source.data.text_column:
        inputs = TextInput(model)
        parts = [_read_ids(rows, inputs.size) for rows in source.both]
    else:
        texts = source.read_texts(TEXTS)
        inputs = TextInput(model, source.directory)
        end = inputs.tokenizer.eos_token_id
        for some in texts:
            ids = [row[IDS] for row in inputs.encode(some, None)[0]]
            ids = [own if end is None or own[-1:] == [end] else [*own, end] for own in ids]
            parts.append([{IDS: own, "labels": own} for own in ids])
    for rows, part in zip(source.both, parts, strict=True):
        bad = BadRows(rows.where, "two tokens or more in every row, one to be learnt")
        for place, row in zip(rows.places, part, strict=True):
            if set(row["labels"][1:]) <= {IGNORED}:
                bad.add(place, f"{len(row[IDS])} tokens, none to be learnt")
        bad.check()
    length, pack = inputs.row_length(source.settings.max_length, LENGTH), source.data.pack
    learnt, scored, notes = source.split(*parts)
    train_rows, eval_rows = (_fit_rows(some or (), length, pack) for some in (learnt, scored))
    if not train_rows:
        raise BadInputError(
            source.train.where,
            expected=f"tokens to learn among the first {length} of a row",
            found="none",
            remedy="give a longer --max-length",
        )
    long = sum(len(row[IDS]) > length for row in (*learnt, *(scored or ())))
    if pack:
        notes += (f"{len(learnt)} texts are packed into {len(train_rows)} rows of {length} tokens",)
    elif long:
        notes += (f"{long} rows are longer than {length} tokens and were cut",)
    return source.task(
        model,
        train_rows,
        eval_rows or None,
        scores.NEXT_TOKENS,
        data_collator=inputs.collate,
        task_type="CAUSAL_LM",
        notes=notes,
    )


def _read_ids(rows: Rows, size: int) -> list[Row]:
    """Rows of ready token ids; labels are the same, unless a column gives them."""
    bad = BadRows(rows.where, f"lists of token ids below {size}, and as many labels")
    targets = rows.column("labels" if "labels" in rows.columns else IDS)
    found = []
    for place, ids, given in zip(rows.places, rows.column(IDS), targets, strict=True):
        labels = ids if given is None else given
        if not _are_ids(ids, range(size)):
            bad.add(place, f"input_ids {ids!r:.60}")
        elif not _are_ids(labels, range(IGNORED, size)) or len(labels) != len(ids):
            bad.add(place, f"labels {labels!r:.60}")
        found.append({IDS: ids, "labels": labels})
    bad.check()
    return found


def _are_ids(value: Any, allowed: range) -> bool:
    return isinstance(value, list) and all(type(i) is int and i in allowed for i in value)


def _fit_rows(rows: Sequence[Row], length: int, pack: bool) -> list[Row]:
    """Rows of at most `length` tokens that have some to learn."""
    if pack:
        joined = {name: [i for row in rows for i in row[name]] for name in (IDS, "labels")}
        starts = range(0, len(joined[IDS]), length)
        rows = [{name: ids[at : at + length] for name, ids in joined.items()} for at in starts]
    # The first label never counts: nothing stands before it.
    cut = [{IDS: row[IDS][:length], "labels": [IGNORED, *row["labels"][1:length]]} for row in rows]
    return [row for row in cut if any(label != IGNORED for label in row["labels"])]
