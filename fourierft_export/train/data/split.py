"""Which rows are learnt from and which are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from ...errors import UsageError
from ..settings import TrainSettings

T = TypeVar("T")
MAX_HELD_OUT = 1000


def split(
    parts: Sequence[Sequence[T]], settings: TrainSettings
) -> tuple[list[T], list[T] | None, tuple[str, ...]]:
    """Rows to learn from and rows to score, each in the file's order."""
    train, notes, held = parts[0], [], 0
    scored: list[T] | None = list(parts[1]) if len(parts) > 1 else None
    count = len(train)
    order: Any = np.random.default_rng(settings.seed).permutation(count)
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
        scored = [train[i] for i in np.sort(order[:held])]
    kept = np.sort(order[held:][: settings.max_train_rows])
    if len(kept) < count - held:
        notes.append(f"{len(kept)} of {count - held} training rows are used")
    return [train[i] for i in kept], scored, tuple(notes)
