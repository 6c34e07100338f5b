"""Scores from sums that add up over batches and processes; each formula is the textbook's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORED = -100  # torch's and transformers' label for positions that do not count


def class_counts(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """How often each class was right, true and predicted.

    Args:
        logits: (..., classes).
        labels: (...) int64; `IGNORED` where there is none.

    Returns:
        "correct", "true", "predicted": each (classes,) int64. Accuracy, F1 and Matthews'
        correlation follow from these, without a matrix of classes by classes.
    """
    classes = logits.shape[-1]
    counted = labels != IGNORED
    labels, predicted = labels[counted], logits.detach().argmax(-1)[counted]

    def count(ids: Tensor) -> Tensor:
        return torch.bincount(ids, minlength=classes)

    return {
        "correct": count(labels[predicted == labels]),
        "true": count(labels),
        "predicted": count(predicted),
    }


def class_scores(correct: Tensor, true: Tensor, predicted: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews' correlation.

    F1 is averaged over the classes that are true or predicted somewhere. Matthews' correlation is
    the one for many classes (Gorodkin 2004), 0 where its denominator is.

    Args:
        correct, true, predicted: (classes,) as `class_counts` gives them, summed.
    """
    c, t, p = correct.cpu().double(), true.cpu().double(), predicted.cpu().double()
    rows, right = float(t.sum()), float(c.sum())
    occurs = (t + p) > 0
    f1 = (2 * c[occurs] / (t + p)[occurs]).mean() if bool(occurs.any()) else torch.zeros(())
    spread = (rows**2 - float(p @ p)) * (rows**2 - float(t @ t))
    matthews = (right * rows - float(t @ p)) / math.sqrt(spread) if spread > 0 else 0.0
    return {
        "accuracy": right / rows if rows else 0.0,
        "f1": float(f1),
        "matthews": matthews,
    }


def entity_counts(true: Tensor, predicted: Tensor, kinds: Tensor, begins: Tensor) -> Tensor:
    """Entities of BIO tags that were found, wrongly found, and missed.

    An entity begins at B-x, or at I-x that does not follow x (as CoNLL's own script has it); it
    counts as found when its begin, its end and its kind are right.

    Args:
        true: (rows, length) int64 tags; `IGNORED` at positions that are no word's first part.
        predicted: the same shape.
        kinds: (tags,) int64: 0 for O, else the kind of entity.
        begins: (tags,) bool: whether a tag is a B-x.

    Returns:
        (3,) int64: true positives, false positives, false negatives.
    """
    counted = true != IGNORED
    row = torch.arange(len(true), device=true.device)[:, None].expand_as(true)[counted]
    spans = [_spans(tags[counted], row, kinds, begins) for tags in (true, predicted)]
    (start_t, end_t, kind_t), (start_p, end_p, kind_p) = spans
    hit = (start_t & start_p & (end_t == end_p) & (kind_t == kind_p)).sum()
    return torch.stack([hit, start_p.sum() - hit, start_t.sum() - hit])


def _spans(
    tags: Tensor, row: Tensor, kinds: Tensor, begins: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of words in a line: whether an entity starts there, where one from there ends, its kind."""
    kind = kinds[tags]
    if not len(tags):
        return kind.bool(), kind, kind
    goes_on = (kind[1:] == kind[:-1]) & (row[1:] == row[:-1]) & (kind[1:] > 0) & ~begins[tags[1:]]
    edge = torch.zeros(1, dtype=torch.bool, device=tags.device)
    start = (kind > 0) & ~torch.cat([edge, goes_on])
    is_last = ~torch.cat([goes_on, edge])
    place = torch.arange(len(tags), device=tags.device)
    ends = torch.where(is_last, place, len(tags))
    return start, ends.flip(0).cummin(0).values.flip(0), kind


def entity_scores(counts: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of entities from their counts; 0 where nothing was there."""
    hit, wrong, missed = (float(n) for n in counts.cpu())
    return {
        "precision": hit / (hit + wrong) if hit else 0.0,
        "recall": hit / (hit + missed) if hit else 0.0,
        "f1": 2 * hit / (2 * hit + wrong + missed) if hit else 0.0,
    }
