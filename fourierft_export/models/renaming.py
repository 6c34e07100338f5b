"""Modules whose tensors a checkpoint calls otherwise.

transformers renames tensors of some families while it loads them (a vision transformer's
`encoder.layer.0.attention.attention.query` is the module `layers.0.attention.q_proj`), and back
while it saves them. What it renames is asked of transformers itself, on a model without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def renamed_modules(
    directory: Path, config: Mapping[str, Any], tensors: Iterable[str]
) -> dict[str, str]:
    """The module paths of a loaded model that differ from what its checkpoint calls them.

    Args:
        directory: a Hugging Face model directory.
        config: its config.json.
        tensors: its tensor names.

    Returns:
        Path of the module in the loaded model -> path in the checkpoint. Empty when transformers
        is not installed, does not know the model or renames nothing. Tensors that it merges or
        splits are not in it.
    """
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {}
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    family = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(family, type) and issubclass(family, transformers.PreTrainedModel)):
        return {}
    # A config that transformers cannot read has no modules to speak of; errors are of many kinds.
    try:
        known = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            model = family(known)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError):
        return {}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    found: dict[str, str] = {}
    for stored in tensors:
        loaded, converter = rename_source_key(stored, renamings, converters)
        path, _, leaf = loaded.rpartition(".")
        old, _, old_leaf = stored.rpartition(".")
        if converter is None and path != old and leaf == old_leaf:
            found[path] = old
    return found
