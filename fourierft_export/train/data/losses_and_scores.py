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


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss at every label, float32 in the shape of `labels`; 0 where labels do not count.

    Integers are classes; floats (rows,) are numbers, (rows, classes) say which classes a row has.
    """
    logits = logits.float()
    if labels.is_floating_point() and labels.ndim > 1:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if labels.is_floating_point():
        return F.mse_loss(logits.flatten(), labels, reduction="none")
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    found = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="none")
    return found.view(labels.shape)


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean loss of the labels that count."""
    items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return losses(logits_of(outputs), labels).sum() / items


def next_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of each token from those before it; the first label never counts."""
    return mean_loss(logits_of(outputs)[:, :-1], labels[:, 1:], num_items_in_batch)


def keep_logits(logits: Any, _labels: Tensor) -> Tensor:
    """All of a row's logits, float32."""
    return logits_of(logits).float()


def keep_tags(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every position the likeliest tag, and its loss."""
    found = logits_of(logits)
    return found.argmax(-1), losses(found, labels)


def keep_sums(logits: Any, labels: Tensor) -> Tensor:
    """Of every row the loss, the tokens that count, and those of them that were right."""
    found, shifted = logits_of(logits)[:, :-1], labels[:, 1:]
    right = (found.argmax(-1) == shifted) & (shifted != IGNORED)
    loss = losses(found, shifted).sum(-1)
    return torch.stack([loss, (shifted != IGNORED).sum(-1), right.sum(-1)], -1)


def score_rows(prediction: Any) -> dict[str, float]:
    """Scores of rows with a class, several classes or a number, by the labels as in `losses`."""
    from sklearn import metrics

    logits, truth = prediction.predictions, prediction.label_ids
    scores = {"loss": float(mean_loss(torch.from_numpy(logits), torch.from_numpy(truth)))}
    if truth.dtype.kind != "f":
        found = logits.argmax(-1)
        scores["accuracy"] = metrics.accuracy_score(truth, found)
        scores["f1"] = metrics.f1_score(truth, found, average="macro", zero_division=0)
        scores["matthews"] = metrics.matthews_corrcoef(truth, found)
    elif truth.ndim > 1:
        truth, found = truth > 0, logits > 0
        scores["f1"] = metrics.f1_score(truth, found, average="micro", zero_division=0)
        scores["accuracy"] = metrics.accuracy_score(truth, found)  # every label of a row right
    else:
        found = logits.reshape(-1)
        scores["loss"] = scores["mse"] = metrics.mean_squared_error(truth, found)
        scores["mae"] = metrics.mean_absolute_error(truth, found)
        scores["r2"] = metrics.r2_score(truth, found) if len(truth) > 1 else 0.0
        spread = found.std() and truth.std()
        scores["pearson"] = np.corrcoef(found, truth)[0, 1] if spread else 0.0
    return {name: float(value) for name, value in scores.items()}


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
        if self.is_bio:
            truth, tags = (
                {
                    (row, *entity)
                    for row, (own, inside) in enumerate(zip(table, counted, strict=True))
                    for entity in self.entities(own[inside])
                }
                for table in (labels, predicted)
            )
            hits = len(truth & tags)
            found["precision"] = hits / max(1, len(tags))
            found["recall"] = hits / max(1, len(truth))
            found["f1"] = 2 * hits / max(1, len(truth) + len(tags))
        return found

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


def scoring(kind: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """How a kind of task learns and is scored, as fields of a `TrainingTask`.

    Args:
        kind: a problem type of transformers, or "tags" or "next tokens".
        names: of the tags, by id.
    """
    loss, keep, score, metric = {
        "single_label_classification": (mean_loss, keep_logits, score_rows, "accuracy"),
        "multi_label_classification": (mean_loss, keep_logits, score_rows, "f1"),
        "regression": (mean_loss, keep_logits, score_rows, "mse"),
        "tags": (mean_loss, keep_tags, ScoreTags(names), "accuracy"),
        "next tokens": (next_token_loss, keep_sums, score_text, "loss"),
    }[kind]
    if isinstance(score, ScoreTags) and score.is_bio:
        metric = "f1"
    return {
        "compute_loss_func": loss,
        "compute_metrics": score,
        "preprocess_logits_for_metrics": keep,
        "metric_for_best_model": metric,
    }
