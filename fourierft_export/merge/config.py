"""What a merge changes in config.json: dtype, untied embeddings, the head's architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..bundle.file import Bundle
from ..errors import UsageError
from ..models import task as tasks
from ..models.base import T5_FAMILIES, Base
from .changes import Changes


def make_config(
    base: Base,
    bundles: Sequence[Bundle],
    weights: Sequence[float],
    changes: Changes,
    dtype: str,
    labels: Sequence[str] | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make the config.json of a merge's output ({} for a base without one), and notes."""
    notes = []
    heads = [bundle for bundle in bundles if bundle.saved]
    if any(w != 1 and bundle.saved for w, bundle in zip(weights, bundles, strict=True)):
        notes.append("weights scale delta_W only: heads and biases are not scaled")
    added = sorted(changes.outside - {*base.tensors})
    brought = [key for key in added if changes.tensors[key].value is not None]
    if not base.config:
        if labels is not None:
            raise UsageError(
                "labels", expected="none: the base has no config.json for them", found=f"{labels}"
            )
        if added or changes.unties:
            notes.append("the base has no config.json: none was made")
        return {}, tuple(notes)
    types = sorted({bundle.spec.task_type or "" for bundle in heads or bundles} - {""})
    task_type = types[0] if len(types) == 1 else None
    shapes = {name: value.shape for b in bundles for name, value in b.saved.items()}
    config = _with_labels(base.config, task_type, shapes, labels)
    if added:
        task = tasks.likely_task(config, task_type)
        # A model without a head needs no new architecture.
        has_head = task is not None and task.name != "feature-extraction"
        name = tasks.architecture_for(config, task) if task and has_head else None
        if name is not None:
            config["architectures"] = [name]
        elif brought:
            known = f"task types {', '.join(types)}" if types else "an adapter without a task type"
            known = f"task type {task_type}" if task_type else known
            notes.append(
                f"{', '.join(added)} added, but no architecture is known for "
                f"{known}: set architectures in config.json"
            )
    if changes.unties:
        # T5 would read False as "do not scale the decoder's outputs".
        is_t5 = base.model_type in T5_FAMILIES
        if not is_t5:
            config["tie_word_embeddings"] = False
        if is_t5 and added:
            notes.append(
                "the output embedding was tied and is now a separate weight; transformers 4 would "
                "tie it again"
            )
        elif len(brought) < len(added):
            notes.append("the output embedding was tied and is now a separate weight")
    if dtype != "keep":
        # transformers loads a checkpoint in the dtype its config names, by a new and an old key.
        config["dtype"] = dtype
        config.update({"torch_dtype": dtype} if "torch_dtype" in config else {})
    return config, tuple(notes)


def _with_labels(
    config: Mapping[str, Any],
    task_type: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    labels: Sequence[str] | None,
) -> dict[str, Any]:
    """Copy `config` with as many labels as the head that an adapter brings.

    Their names are `labels`, by default those of `config` when their number is right, else LABEL_0,
    LABEL_1 and so on, as transformers has it; transformers derives num_labels from id2label.
    """
    task = tasks.likely_task(config, task_type)
    count = tasks.head_labels(shapes) if task is not None and task.labelled else None
    if labels is not None and len(labels) != count:
        expected = "no labels: the adapter brings no head" if count is None else f"{count}"
        raise UsageError("labels", expected=expected, found=str(len(labels)))
    if labels is not None and (len(set(labels)) != len(labels) or "" in labels):
        # label2id would lose one of two equal names.
        raise UsageError("labels", expected="different names", found=", ".join(map(repr, labels)))
    known = config.get("id2label")
    if count is None or (labels is None and isinstance(known, dict) and len(known) == count):
        return dict(config)
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(count)]
    changed = {key: value for key, value in config.items() if key != "num_labels"}
    changed["id2label"] = {str(i): name for i, name in enumerate(names)}
    changed["label2id"] = {name: i for i, name in enumerate(names)}
    return changed
