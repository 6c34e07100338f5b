"""The model to train, of a directory or a Hub id, with a new head if needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...adapt.config import ALL_LINEAR
from ...adapt.targets import USUAL_TARGETS
from ...errors import BaseMismatchError, FileAccessError
from ...files.hub import local_model
from ...models.load import from_pretrained
from ...models.task import get_task, likely_task, read_config

_QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))


def find_model(name: str) -> str:
    """The directory of a model: `name` itself, or where the Hub's cache holds that id."""
    path = os.fspath(local_model(name, old_names=True))
    if os.path.isdir(path):
        return path
    raise FileAccessError(
        name,
        expected="a model's directory, or its id on the Hub",
        found="a file" if os.path.exists(path) else "nothing there",
        remedy="check the path",
    )


def known_classes(directory: str, task: str) -> tuple[str, ...]:
    """Names by id of the classes that a model of this very task decides between already."""
    config = read_config(directory)
    likely, named = likely_task(config, None), config.get("id2label")
    if likely is None or likely.name != get_task(task).name or not isinstance(named, Mapping):
        return ()
    ids = {int(i): str(name) for i, name in named.items() if str(i).isdigit()}
    # Names that repeat, or ids with gaps, do not say which class is which.
    whole = sorted(ids) == list(range(len(named) or 1)) and len(set(ids.values())) == len(ids)
    return tuple(ids[i] for i in sorted(ids)) if whole else ()


def load_classifier(
    directory: str, task: str, names: Sequence[str], *, dtype: str | None, seed: int
) -> tuple[Any, tuple[str, ...]]:
    """A model with a head for `names`, and its modules that are new: drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing, mismatched = from_pretrained(
            directory, task, num_labels=len(names), dtype=dtype
        )
    config: Any = model.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    left = {*missing, *mismatched}
    new: list[str] = []  # the topmost modules all of whose parameters are missing
    for path, module in model.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and own and own <= left and not any(part.isdigit() for part in path.split(".")):
            new.append(path)
            left -= own
    left &= {name for name, _ in model.named_parameters()}
    if left:
        raise BaseMismatchError(
            directory,
            expected=f"every weight of {type(model).__name__} but its head",
            found=f"{len(left)} others are missing or have another shape",
            remedy="give a base for this task, or name another with --task",
            offenders=sorted(left),
        )
    return model.eval(), tuple(new)


def usual_targets(model: nn.Module) -> tuple[str, ...] | str | None:
    """Query and value, by the names that families give them; None for an architecture's usual."""
    config: Any = model.config
    if config.model_type in USUAL_TARGETS:
        return None
    ends = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return next((names for names in _QUERY_VALUE if ends.issuperset(names)), ALL_LINEAR)
