"""One row through a model of the user's own, before anything is built on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError
from .losses import logits_of


def count_classes(
    model: nn.Module, labels: int, example: str, *args: Tensor, axes: int = 2, **kwargs: Any
) -> int:
    """How many classes a model decides between, found by running it.

    Args:
        model: is left in the mode that it is in.
        labels: classes that the rows need.
        example: what the model is given, in words.
        args, kwargs: the model's inputs.
        axes: of the logits, the last one being the classes.

    Raises:
        UsageError: it cannot be run, returns no such logits, or has too few classes.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = logits_of(model(*args, **kwargs))
        shape = list(logits.shape)
    # What models raise for inputs that they were not made for.
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise UsageError(
            type(model).__name__,
            expected=f"a model that takes {example} and returns logits",
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            remedy="correct the model or the rows",
        ) from error
    finally:
        model.train(was_training)
    if len(shape) != axes or shape[-1] < labels:
        raise UsageError(
            type(model).__name__,
            expected=f"logits of {axes} axes, the last one {labels} or more, one per label",
            found=f"shape {shape}",
            remedy="give the model as many outputs as there are labels",
        )
    return shape[-1]
