"""Inputs to trace a transformers model with, and the names people expect them to have."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from .task import get_task

if TYPE_CHECKING:
    import torch

BATCH_AXIS, SEQUENCE_AXIS = "batch", "sequence"


def input_names(model: torch.nn.Module) -> list[str]:
    """The text inputs of a model: input_ids, attention_mask, and token_type_ids where they count.

    A model with one token type (RoBERTa) takes token_type_ids without using them: left out.
    """
    accepted = inspect.signature(model.forward).parameters
    types = getattr(getattr(model, "config", None), "type_vocab_size", 0) or 0
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if types > 1 else [])
    return [name for name in names if name in accepted]


def output_names(model: torch.nn.Module, task: str) -> list[str]:
    """The outputs of a model for `task`; an encoder without a pooler has no pooler_output."""
    names = list(get_task(task).outputs)
    if "pooler_output" in names and getattr(model, "pooler", None) is None:
        names.remove("pooler_output")
    return names


def example_inputs(
    model: torch.nn.Module, task: str, *, batch: int = 2, length: int = 16
) -> dict[str, torch.Tensor]:
    """Deterministic inputs; the last row is padded by a quarter, so that the mask counts.

    Args:
        model: a transformers model.
        task: one of `models.task.TASKS`.
        batch, length: sizes of the two axes, at least 2 so that neither is traced as a constant.

    Returns:
        int64 tensors of shape (batch, length) by name.
    """
    import torch

    get_task(task)
    config = model.config
    vocabulary = int(config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    ids = torch.arange(batch * length).reshape(batch, length) * 7919 % max(vocabulary - 1, 1) + 1
    mask = torch.ones(batch, length, dtype=torch.int64)
    padding = length // 4
    if padding:
        mask[-1, -padding:] = 0
        ids[-1, -padding:] = getattr(config, "pad_token_id", None) or 0
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: every[name] for name in input_names(model)}
