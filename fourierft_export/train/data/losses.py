"""How a batch becomes a loss: cross entropy in float32, summed over what counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..task import Batch, StepResult, Sums
from .scores import IGNORED, class_counts, class_scores, entity_counts, entity_scores


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returns: a tensor, or something with `.logits`."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _inputs(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of (..., classes) and (...), summed in float32 where labels count."""
    flat = logits.flatten(0, -2).float()
    return cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")


def classify(model: nn.Module, batch: Batch) -> StepResult:
    """One label per row: logits (rows, classes), labels (rows,)."""
    labels = batch["labels"]
    logits = logits_of(model(**_inputs(batch)))
    return StepResult(summed(logits, labels), len(labels), class_counts(logits, labels))


def score_classes(sums: Sums) -> dict[str, float]:
    """Metrics of `classify`: accuracy, f1, matthews."""
    return class_scores(sums["correct"], sums["true"], sums["predicted"])


@dataclass(frozen=True)
class TagWords:
    """One label per word: logits (rows, length, tags), labels (rows, length).

    Attributes:
        kinds: (tags,) int64, 0 for O; None where tags are not BIO.
        begins: (tags,) bool: B- tags.
    """

    kinds: Tensor | None
    begins: Tensor | None

    def __call__(self, model: nn.Module, batch: Batch) -> StepResult:
        """Loss and counts of one batch."""
        labels = batch["labels"]
        logits = logits_of(model(**_inputs(batch)))
        sums = class_counts(logits, labels)
        if self.kinds is not None and self.begins is not None:
            kinds, begins = self.kinds.to(labels.device), self.begins.to(labels.device)
            predicted = logits.detach().argmax(-1)
            sums["entities"] = entity_counts(labels, predicted, kinds, begins)
        return StepResult(summed(logits, labels), int((labels != IGNORED).sum()), sums)


def score_tags(sums: Sums) -> dict[str, float]:
    """Metrics of `TagWords`: accuracy of words; precision, recall and f1 of entities, if any."""
    accuracy = score_classes(sums)["accuracy"]
    entities = entity_scores(sums["entities"]) if "entities" in sums else {}
    return {"accuracy": accuracy, **entities}


def continue_text(model: nn.Module, batch: Batch) -> StepResult:
    """Each token from those before it: logits (rows, length, vocabulary), labels (rows, length).

    The sums repeat loss and count in float64, for the perplexity.
    """
    labels = batch["labels"][:, 1:]
    logits = logits_of(model(**_inputs(batch)))[:, :-1]
    loss = summed(logits, labels)
    counted = labels != IGNORED
    correct = (logits.detach().argmax(-1) == labels)[counted].sum()
    tokens = counted.sum()
    # On the CPU: not every device has float64.
    sums = {"loss_sum": loss.detach().cpu().double(), "tokens": tokens, "correct": correct}
    return StepResult(loss, int(tokens), sums)


def score_text(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of `continue_text`: perplexity, and how often the likeliest token is right."""
    tokens = sums["tokens"].cpu().double().clamp(min=1)
    mean = sums["loss_sum"].cpu() / tokens
    return {
        "perplexity": float(torch.exp(mean)),
        "accuracy": float(sums["correct"].cpu() / tokens),
    }
