"""The model to train: a directory's, with a new head where the task needs one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...adapt.config import ALL_LINEAR
from ...adapt.targets import SEQUENCE_HEADS, USUAL_TARGETS
from ...errors import BaseMismatchError
from ...models.load import from_pretrained, load_model
from ...models.task import likely_task, read_config

_QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))


def known_classes(directory: str | os.PathLike[str], task: str) -> dict[str, int] | None:
    """Name -> id of the classes that a model of this very task decides between already."""
    config = read_config(directory)
    likely = likely_task(config, None)
    named = config.get("id2label")
    if likely is None or likely.name != task or not isinstance(named, Mapping):
        return None
    found = {str(name): int(i) for i, name in named.items() if str(i).isdigit()}
    # Names that repeat, or ids with gaps, do not say which class is which.
    return found if sorted(found.values()) == list(range(len(named) or 1)) else None


def load_classifier(
    directory: str | os.PathLike[str],
    task: str,
    names: tuple[str, ...],
    *,
    dtype: str | None,
    seed: int,
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model with a head for `names`; what the checkpoint lacks of it is drawn by `seed`.

    Args:
        directory: a Hugging Face model directory.
        task: one of `models.task.TASKS` with labels.
        names: of the classes, by id.
        dtype: name of a torch dtype; None keeps the checkpoint's.
        seed: of new weights; torch's own generator is left alone.

    Returns:
        The model in eval mode on the CPU, and paths of the modules that are new: an adapter
        trained without saving them would belong to a head that nobody has.

    Raises:
        BadInputError: transformers cannot load the directory.
        BaseMismatchError: more is missing than a head.
        MissingExtraError: torch or transformers is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing, mismatched = from_pretrained(
            directory, task, num_labels=len(names), dtype=dtype
        )
    config: Any = model.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.use_cache = False  # a decoder's, which training has no use for
    return model.eval(), _new_modules(directory, model, {*missing, *mismatched})


def load_causal(directory: str | os.PathLike[str], *, dtype: str | None) -> nn.Module:
    """A language model, whole, in eval mode on the CPU; it keeps no cache of keys and values.

    Raises:
        BadInputError, BaseMismatchError, MissingExtraError: as `models.load.load_model`.
    """
    model = load_model(directory, "text-generation", dtype=dtype)
    config: Any = model.config
    config.use_cache = False
    return model


def trained_heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of a classifier's head, for tasks whose type does not name it."""
    return tuple(name for name, _ in model.named_children() if name in SEQUENCE_HEADS)


def usual_targets(model: nn.Module) -> tuple[str, ...] | str | None:
    """The layers to adapt: query and value, by the names that families give them.

    Returns:
        None where the architecture has usual targets; path ends; or all linear layers.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in USUAL_TARGETS:
        return None
    ends = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return next((names for names in _QUERY_VALUE if ends.issuperset(names)), ALL_LINEAR)


def _new_modules(
    directory: str | os.PathLike[str], model: nn.Module, new: set[str]
) -> tuple[str, ...]:
    """The topmost modules all of whose parameters are in `new`.

    Raises:
        BaseMismatchError: `new` holds something else too, or parts of the repeated blocks.
    """
    found: list[str] = []
    left = set(new)
    for path, module in model.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and own and own <= left and not any(part.isdigit() for part in path.split(".")):
            found.append(path)
            left -= own
    parameters = {name for name, _ in model.named_parameters()}
    if left & parameters:
        raise BaseMismatchError(
            directory,
            expected=f"every weight of {type(model).__name__} but its head",
            found=f"{len(left & parameters)} others are missing or have another shape",
            remedy="give a base for this task, or name another with --task",
            offenders=sorted(left & parameters),
        )
    return tuple(found)
