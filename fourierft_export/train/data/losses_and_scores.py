"""Losses and scores of the tasks, as transformers' Trainer calls them.

A loss is the sum over a part of a batch, divided by the number of items of the whole batch: parts
and processes then add up to the mean. What is kept of the logits for the scores is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...types import Array

IGNORED = -100  # torch's and transformers' label for positions that do not count


def logits_of(outputs: Any) -> Tensor:
    """The logits of what a model returns: a tensor, a tuple's first, or `.logits`."""
    if isinstance(outputs, tuple):
        outputs = outputs[0]
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return found


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in float32 at every label, 0 where labels do not count; shape of `labels`."""
    flat = logits.flatten(0, -2).float()
    losses = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape)


def class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of (..., classes) where labels (...) count."""
    items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return _losses(logits_of(outputs), labels).sum() / items


def number_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Squared error of (rows, 1) against (rows,)."""
    items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    return F.mse_loss(logits_of(outputs).float().flatten(), labels, reduction="sum") / items


def several_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Binary cross entropy of (rows, classes) against 0 and 1."""
    items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    logits = logits_of(outputs).float()
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / items


def next_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of each token from those before it; the first label never counts."""
    return class_loss(logits_of(outputs)[:, :-1], labels[:, 1:], num_items_in_batch)


def keep_logits(logits: Any, _labels: Tensor) -> Tensor:
    """All of a row's logits, float32."""
    return logits_of(logits).float()


def keep_tags(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every position the likeliest tag, and its loss."""
    found = logits_of(logits)
    return found.argmax(-1), _losses(found, labels)


def keep_sums(logits: Any, labels: Tensor) -> Tensor:
    """Of every row the loss, the tokens that count, and those of them that were right."""
    found, shifted = logits_of(logits)[:, :-1], labels[:, 1:]
    right = (found.argmax(-1) == shifted) & (shifted != IGNORED)
    loss = _losses(found, shifted).sum(-1)
    return torch.stack([loss, (shifted != IGNORED).sum(-1), right.sum(-1)], -1)


def score_classes(prediction: Any) -> dict[str, float]:
    """Mean loss, accuracy, macro F1 and Matthews' correlation of one class per row."""
    from sklearn import metrics

    logits, labels = prediction.predictions, prediction.label_ids
    found = logits.argmax(-1)
    return {
        "loss": float(class_loss(torch.from_numpy(logits), torch.from_numpy(labels))),
        "accuracy": float(metrics.accuracy_score(labels, found)),
        "f1": float(metrics.f1_score(labels, found, average="macro", zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(labels, found)),
    }


def score_numbers(prediction: Any) -> dict[str, float]:
    """Mean squared and absolute error, R squared and Pearson's correlation of a regression."""
    from sklearn import metrics

    found, truth = prediction.predictions.reshape(-1), prediction.label_ids
    mse = float(metrics.mean_squared_error(truth, found))
    spread = bool(found.std() and truth.std())
    return {
        "loss": mse,
        "mse": mse,
        "mae": float(metrics.mean_absolute_error(truth, found)),
        "r2": float(metrics.r2_score(truth, found)) if len(truth) > 1 else 0.0,
        "pearson": float(np.corrcoef(found, truth)[0, 1]) if spread else 0.0,
    }


def score_several(prediction: Any) -> dict[str, float]:
    """Mean loss, F1 over all labels of all rows, and the share of rows with every label right."""
    from sklearn import metrics

    logits, truth = prediction.predictions, prediction.label_ids
    found = logits > 0
    return {
        "loss": float(several_loss(torch.from_numpy(logits), torch.from_numpy(truth))),
        "f1": float(metrics.f1_score(truth > 0, found, average="micro", zero_division=0)),
        "accuracy": float(metrics.accuracy_score(truth > 0, found)),
    }


def score_text(prediction: Any) -> dict[str, float]:
    """Mean loss of a token, perplexity, and how often the likeliest token is right."""
    loss, tokens, right = prediction.predictions.astype(np.float64).sum(0)
    mean = loss / max(tokens, 1.0)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"loss": mean, "perplexity": perplexity, "accuracy": right / max(tokens, 1.0)}


class ScoreTags:
    """Mean loss and accuracy of words; of BIO tags also precision, recall and F1 of entities."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        bio = all(name == "O" or name[:2] in ("B-", "I-") for name in names)
        self.is_bio = bio and set(names) > {"O"}

    def __call__(self, prediction: Any) -> dict[str, float]:
        """The scores of all rows."""
        (predicted, losses), labels = prediction.predictions, prediction.label_ids
        counted = labels != IGNORED
        found = {
            "loss": float(losses[counted].astype(np.float64).mean()),
            "accuracy": float((predicted == labels)[counted].mean()),
        }
        if not self.is_bio:
            return found
        hit = true = seen = 0
        for row, tags, inside in zip(labels, predicted, counted, strict=True):
            here, there = self.entities(row[inside]), self.entities(tags[inside])
            hit, true, seen = hit + len(here & there), true + len(here), seen + len(there)
        return found | {
            "precision": hit / seen if hit else 0.0,
            "recall": hit / true if hit else 0.0,
            "f1": 2 * hit / (true + seen) if hit else 0.0,
        }

    def entities(self, tags: Array) -> set[tuple[int, int, str]]:
        """(begin, end, kind) of the entities in a row of tags."""
        found: set[tuple[int, int, str]] = set()
        begin, kind = 0, ""
        for place, name in enumerate([*(self.names[tag] for tag in tags), "O"]):
            if kind and (name == "O" or name[0] == "B" or name[2:] != kind):
                found.add((begin, place, kind))
                kind = ""
            if name != "O" and not kind:
                begin, kind = place, name[2:]
        return found


def _scoring(loss: Any, scores: Any, keep: Any, metric: str) -> dict[str, Any]:
    """Those fields of a `TrainingTask`."""
    return {
        "compute_loss_func": loss,
        "compute_metrics": scores,
        "preprocess_logits_for_metrics": keep,
        "metric_for_best_model": metric,
    }


CLASSES = _scoring(class_loss, score_classes, keep_logits, "accuracy")
SEVERAL = _scoring(several_loss, score_several, keep_logits, "f1")
NUMBERS = _scoring(number_loss, score_numbers, keep_logits, "mse")
NEXT_TOKENS = _scoring(next_token_loss, score_text, keep_sums, "loss")


def tags(names: Sequence[str]) -> dict[str, Any]:
    """How words' labels are learnt and scored."""
    score = ScoreTags(names)
    return _scoring(class_loss, score, keep_tags, "f1" if score.is_bio else "accuracy")
