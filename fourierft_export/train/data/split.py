"""Which rows are learnt from and which are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ...errors import UsageError

T = TypeVar("T")
MAX_HELD_OUT = 1000


@dataclass(frozen=True)
class SplitSettings:
    """How rows are chosen.

    Attributes:
        max_rows: of the training rows, at most so many, drawn by `seed`; None for all.
        eval_share: without rows for scoring, this share of the training rows is held out (at least
            one row, at most `MAX_HELD_OUT`); 0 for none.
        seed: of the draws.

    Raises:
        UsageError: a value out of range.
    """

    max_rows: int | None = None
    eval_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.max_rows is not None and self.max_rows < 1:
            raise UsageError("max_rows", expected="at least 1", found=str(self.max_rows))
        if not 0 <= self.eval_share < 1:
            raise UsageError(
                "eval_share", expected="at least 0 and below 1", found=str(self.eval_share)
            )
        if self.seed < 0:
            raise UsageError("seed", expected="at least 0", found=str(self.seed))


def split(
    train: Sequence[T], scored: Sequence[T] | None, settings: SplitSettings
) -> tuple[list[T], list[T] | None, tuple[str, ...]]:
    """Rows to learn from and rows to score, each in the file's order.

    Args:
        train: rows of the training file.
        scored: rows of the evaluation file, or None.
        settings: how rows are chosen. What is held out does not depend on `max_rows`.

    Returns:
        Training rows, rows to score (None for none), and what a user should know.

    Raises:
        UsageError: a single row cannot be shared out.
    """
    notes: list[str] = []
    count = len(train)
    order = np.random.default_rng(settings.seed).permutation(count)
    held = 0
    if scored is None and settings.eval_share > 0:
        if count < 2:
            raise UsageError(
                "eval_share",
                expected="two rows or more",
                found=f"{count}",
                remedy="give rows to score with --eval, or hold out none with --eval-share 0",
            )
        held = min(max(round(count * settings.eval_share), 1), MAX_HELD_OUT, count - 1)
        notes.append(f"no rows to score were given: {held} of {count} training rows are held out")
    kept = np.sort(order[held:][: settings.max_rows])
    if len(kept) < count - held:
        notes.append(f"{len(kept)} of {count - held} training rows are used")
    if held:
        scored = [train[i] for i in np.sort(order[:held])]
    return [train[i] for i in kept], None if scored is None else list(scored), tuple(notes)
