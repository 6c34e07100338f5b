"""Example inputs to trace a transformers model with, and the usual names of inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import BadInputError, UsageError

if TYPE_CHECKING:
    import torch

BATCH_AXIS, SEQUENCE_AXIS = "batch", "sequence"
IMAGES = "pixel_values"
MAX_VALUES = 1 << 28


def input_names(model: torch.nn.Module) -> list[str]:
    """Names of a model's inputs: pixel_values for images, else those of text that it uses."""
    if getattr(model, "main_input_name", None) == IMAGES:
        return [IMAGES]
    accepted = inspect.signature(model.forward).parameters
    # RoBERTa accepts token_type_ids and ignores them.
    types = getattr(getattr(model, "config", None), "type_vocab_size", 0) or 0
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if types > 1 else [])
    return [name for name in names if name in accepted]


def dynamic_axes(inputs: Iterable[str]) -> dict[str, dict[int, str]]:
    """Input name -> its symbolic axes: the batch, and for text the sequence."""
    text = {0: BATCH_AXIS, 1: SEQUENCE_AXIS}
    return {name: {0: BATCH_AXIS} if name == IMAGES else dict(text) for name in inputs}


def example_inputs(
    model: torch.nn.Module, *, batch: int = 2, length: int = 16
) -> dict[str, torch.Tensor]:
    """Makes deterministic inputs; a quarter of the last row is padding, so that the mask matters.

    `batch` and `length` are 2 or more, or torch traces them as constants.
    """
    import torch

    config: Any = model.config
    names = input_names(model)
    if names == [IMAGES]:
        return {IMAGES: _images(config, batch).to(next(model.parameters()).dtype)}
    if "input_ids" not in names:
        where = f"example inputs for {type(model).__name__}"
        wanted = str(getattr(model, "main_input_name", "others"))
        remedy = "call export_onnx with inputs of your own"
        raise UsageError(where, expected="a model of text or images", found=wanted, remedy=remedy)
    # CANINE has no vocabulary: it takes any character's number.
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", None) or 128)
    ids = torch.arange(batch * length).reshape(batch, length) * 7919 % max(vocabulary - 1, 1) + 1
    end = getattr(config, "eos_token_id", None)
    # Every row ends in the end-of-text token: BART's classifiers look for it.
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padding := length // 4:
        ids[-1] = torch.roll(ids[-1], -padding)
        mask[-1, -padding:] = 0
        ids[-1, -padding:] = getattr(config, "pad_token_id", None) or 0
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: every[name] for name in names}


def _images(config: Any, batch: int) -> torch.Tensor:
    """Images (batch, channels, height, width) float32 of the size in a vision config."""
    import torch

    size = getattr(config, "image_size", None)
    if not size:
        where, remedy = f"example images for {type(config).__name__}", "add it, or use export_onnx"
        raise UsageError(where, expected="image_size in config.json", found="none", remedy=remedy)
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    shape = batch, channels, *sides
    whole = len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or prod(shape) > MAX_VALUES:
        raise BadInputError(
            f"example images for {type(config).__name__}",
            expected="image_size and num_channels in config.json as an image has them",
            found=f"{size!r} and {channels!r}",
        )
    return torch.sin(torch.arange(prod(shape), dtype=torch.float32) * 0.7919).reshape(shape)
