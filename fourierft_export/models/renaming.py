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
    from .load import quiet_transformers

    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    family = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(family, type) and issubclass(family, transformers.PreTrainedModel)):
        return {}
    stored_names = list(tensors)
    if _most_parts(config) > len(stored_names):
        return {}
    # A config that transformers cannot read has no modules to speak of; errors are of many kinds.
    try:
        with quiet_transformers(), torch.device("meta"):
            known = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            model = family(known)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError):
        return {}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    found: dict[str, str] = {}
    for stored in stored_names:
        loaded, converter = rename_source_key(stored, renamings, converters)
        path, _, leaf = loaded.rpartition(".")
        old, _, old_leaf = stored.rpartition(".")
        if converter is None and path != old and leaf == old_leaf:
            found[path] = old
    return found


def _most_parts(config: Mapping[str, Any]) -> int:
    """The largest number of layers, blocks or experts in a config, nested ones included.

    A model is built of the config, if without weights: one that names more of them than there are
    tensors is not this checkpoint's, and might take for ever.
    """
    most = 0
    for key, value in config.items():
        if isinstance(value, Mapping):
            most = max(most, _most_parts(value))
        elif any(part in key for part in ("layer", "block", "expert", "depth")):
            numbers = value if isinstance(value, list) else [value]
            most = max([most, *(number for number in numbers if isinstance(number, int))])
    return most
