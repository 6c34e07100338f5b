"""What a merge changes in config.json: dtype, untied embeddings, the head's architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..models import task as tasks
from ..models.base import Base
from ..models.task import head_labels
from .changes import Changes, Ingredient

Config = Mapping[str, Any]


def merged_config(
    base: Base,
    ingredients: Sequence[Ingredient],
    changes: Changes,
    dtype: str,
    labels: Sequence[str] | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config.json of a merge's output, and what a person should know of it.

    Returns:
        The new config ({} for a base without one), and notes.

    Raises:
        UsageError: `labels` without a head that has as many rows, or without a config.
    """
    notes = []
    if any(i.weight != 1 and i.bundle.saved for i in ingredients):
        notes.append("weights scale delta_W only: heads and biases are taken as they are")
    added = sorted(changes.outside - {*base.tensors})
    if not base.config:
        if labels is not None:
            raise UsageError(
                "labels", expected="none: the base has no config.json for them", found=f"{labels}"
            )
        if added or changes.unties:
            notes.append("the base has no config.json: none was made")
        return {}, tuple(notes)
    task_type, types = _task_type(ingredients)
    shapes = {n: value.shape for i in ingredients for n, value in i.bundle.saved.items()}
    config = with_labels(base.config, task_type, shapes, labels)
    if added:
        with_head = with_architecture(config, task_type)
        config = with_head or config
        if with_head is None and any(key in changes.dense for key in added):
            notes.append(
                f"{', '.join(added)} added, but no architecture is known for "
                f"{types}: set architectures in config.json"
            )
    if changes.unties:
        config = untied(config)
        if any(key not in changes.dense for key in added):
            notes.append("the output embedding was tied and is now a weight of its own")
    return with_dtype(config, dtype), tuple(notes)


def _task_type(ingredients: Sequence[Ingredient]) -> tuple[str | None, str]:
    """The task type of the adapters that carry a head (of all, if none does), and words for it."""
    heads = [i for i in ingredients if i.bundle.saved]
    types = sorted({i.bundle.spec.task_type or "" for i in heads or ingredients} - {""})
    if len(types) == 1:
        return types[0], f"task type {types[0]}"
    return None, f"task types {', '.join(types)}" if types else "an adapter without a task type"


def with_dtype(config: Config, dtype: str) -> dict[str, Any]:
    """`config` for weights of `dtype` ("float32", ...); "keep" changes nothing.

    transformers loads a checkpoint in the dtype its config names, under a new and an old key.
    """
    if dtype == "keep":
        return dict(config)
    changed = dict(config) | {"dtype": dtype}
    return changed | ({"torch_dtype": dtype} if "torch_dtype" in config else {})


def untied(config: Config) -> dict[str, Any]:
    """`config` for a model whose output embedding is a weight of its own."""
    return dict(config) | {"tie_word_embeddings": False}


def with_architecture(config: Config, task_type: str | None) -> dict[str, Any] | None:
    """`config` for the base's family with the head of PEFT's `task_type`.

    Returns:
        A new config, or None when no architecture is known for them.
    """
    task = tasks.likely_task(config, task_type)
    # A model without a head needs no new architecture.
    has_head = task is not None and task.name != "feature-extraction"
    name = tasks.architecture_for(config, task) if task and has_head else None
    return None if name is None else dict(config) | {"architectures": [name]}


def with_labels(
    config: Config,
    task_type: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """`config` with as many labels as the head that an adapter brings.

    Args:
        config: of the base.
        task_type: PEFT's, of the adapter.
        shapes: of the adapter's dense tensors, under their names in the adapted model.
        labels: names of the labels; by default those of `config` when their number is right,
            else LABEL_0, LABEL_1 and so on, as transformers has it.

    Returns:
        A new config; id2label and label2id are set (transformers derives num_labels from them).

    Raises:
        UsageError: `labels` without a head that has as many rows, or not each a name of its own.
    """
    task = tasks.likely_task(config, task_type)
    count = head_labels(shapes) if task is not None and task.labelled else None
    if labels is not None and len(labels) != count:
        raise UsageError(
            "labels",
            expected="no labels: the adapter brings no head" if count is None else f"{count}",
            found=str(len(labels)),
        )
    if labels is not None and (len(set(labels)) != len(labels) or "" in labels):
        # label2id would lose one of two equal names.
        raise UsageError(
            "labels", expected="a name of its own for each", found=", ".join(map(repr, labels))
        )
    known = config.get("id2label")
    if count is None or (labels is None and isinstance(known, dict) and len(known) == count):
        return dict(config)
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(count)]
    changed = {key: value for key, value in config.items() if key != "num_labels"}
    changed["id2label"] = {str(i): name for i, name in enumerate(names)}
    changed["label2id"] = {name: i for i, name in enumerate(names)}
    return changed
