"""Scores from sums equal scikit-learn's on all rows at once, however the rows were batched."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from fourierft_export.train.data.scores import (
    IGNORED,
    class_counts,
    class_scores,
    entity_counts,
    entity_scores,
)


def added(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("skill", [0.0, 0.6, 1.0])
def test_class_scores_are_scikit_learns(classes: int, skill: float) -> None:
    rng = np.random.default_rng(classes)
    true = rng.integers(0, classes, 101)
    guess = np.where(rng.random(101) < skill, true, rng.integers(0, classes, 101))
    logits = torch.nn.functional.one_hot(torch.from_numpy(guess), classes).float()
    batches = zip(logits.split(16), torch.from_numpy(true).split(16), strict=True)
    scores = class_scores(**added([class_counts(*batch) for batch in batches]))
    assert scores == pytest.approx(
        {
            "accuracy": accuracy_score(true, guess),
            "f1": f1_score(true, guess, average="macro"),
            "matthews": matthews_corrcoef(true, guess),
        },
        abs=1e-12,
    )


def test_classes_that_never_occur_do_not_count() -> None:
    """Scikit-learn averages F1 over the classes that occur; all right in one class is no skill."""
    true, guess = torch.tensor([0, 0, 3, 3]), torch.tensor([0, 3, 3, 3])
    logits = torch.nn.functional.one_hot(guess, 9).float()
    scores = class_scores(**class_counts(logits, true))
    assert scores["f1"] == pytest.approx(f1_score(true, guess, average="macro"), abs=1e-12)
    constant = class_scores(**class_counts(torch.eye(9)[[0, 0]], torch.tensor([0, 0])))
    assert constant == {"accuracy": 1.0, "f1": 1.0, "matthews": 0.0}


def test_ignored_positions_do_not_count() -> None:
    logits = torch.eye(3)[torch.tensor([[0, 1, 2], [2, 2, 2]])]
    labels = torch.tensor([[0, IGNORED, 1], [IGNORED, 2, IGNORED]])
    counts = class_counts(logits, labels)
    assert {name: tensor.tolist() for name, tensor in counts.items()} == {
        "correct": [1, 0, 1],
        "true": [1, 1, 1],
        "predicted": [1, 0, 2],
    }


TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
KINDS = torch.tensor([0, 1, 1, 2, 2])
BEGINS = torch.tensor([False, True, False, True, False])


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """(begin, end, kind) of a sentence's entities, word by word, as CoNLL's script reads BIO."""
    found = []
    open_at, open_kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        kind = tag[2:]
        if open_kind and (tag == "O" or tag[0] == "B" or kind != open_kind):
            found.append((open_at, i, open_kind))
            open_kind = ""
        if tag != "O" and not open_kind:
            open_at, open_kind = i, kind
    return set(found)


@pytest.mark.parametrize("seed", range(8))
def test_entities_are_those_of_a_word_by_word_reading(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(40):
        length = int(rng.integers(1, 9))
        true = rng.integers(0, 5, length)
        sentences.append((true, np.where(rng.random(length) < 0.7, true, rng.integers(0, 5))))
    hit = wrong = missed = 0
    for true, guess in sentences:
        a, b = entities([TAGS[i] for i in true]), entities([TAGS[i] for i in guess])
        hit, wrong, missed = hit + len(a & b), wrong + len(b - a), missed + len(a - b)
    parts = []
    for start in range(0, 40, 7):
        some = sentences[start : start + 7]
        # Words sit on every other position, and what a model says in between does not matter.
        labels = torch.full((len(some), 18), IGNORED)
        guesses = torch.from_numpy(rng.integers(0, 5, (len(some), 18)))
        for row, (true, guess) in enumerate(some):
            labels[row, 1 : 2 * len(true) : 2] = torch.from_numpy(true)
            guesses[row, 1 : 2 * len(true) : 2] = torch.from_numpy(guess)
        parts.append(entity_counts(labels, guesses, KINDS, BEGINS))
    assert torch.stack(parts).sum(0).tolist() == [hit, wrong, missed]
    assert hit and wrong and missed


def test_entity_scores() -> None:
    scores = entity_scores(torch.tensor([6, 2, 4]))
    assert scores == pytest.approx({"precision": 0.75, "recall": 0.6, "f1": 2 / 3})
    nothing = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert entity_scores(torch.tensor([0, 0, 0])) == nothing
    empty = entity_counts(torch.tensor([[IGNORED]]), torch.tensor([[0]]), KINDS, BEGINS)
    assert empty.tolist() == [0, 0, 0]
