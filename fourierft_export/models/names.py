"""The ways in which an adapter's names differ from those of a base.

By one prefix: the adapter was trained on a task model (`bert.encoder...`) and the base is the bare
encoder (`encoder...`), or the other way round. And where a checkpoint is older than the model's
code: transformers renames tensors of some families while it loads them (a vision transformer's
`encoder.layer.0.attention.attention.query` is the module `layers.0.attention.q_proj`), and back
while it saves them. What it renames is asked of transformers itself, on a model without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .load import quiet_transformers
from .task import architecture_of


@dataclass(frozen=True)
class Bridge:
    """The one prefix by which an adapter's paths and a checkpoint's names differ.

    Attributes:
        strip: prefix that the adapter has and the checkpoint lacks ("bert"), or "".
        add: prefix that the checkpoint has and the adapter lacks, or "".
        renamed: module path -> what the checkpoint calls it, prefixes apart (`renamed_modules`).
    """

    strip: str = ""
    add: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_base(self, name: str) -> str:
        """An adapter's module path or tensor name as the checkpoint has it."""
        if self.strip and name.startswith(f"{self.strip}."):
            name = name[len(self.strip) + 1 :]
        elif self.add:
            name = f"{self.add}.{name}"
        path, dot, leaf = name.rpartition(".")
        return self.renamed.get(name) or self.renamed.get(path, path) + dot + leaf


def find_bridge(names: Iterable[str], roots: Iterable[str], has: Callable[[str], bool]) -> Bridge:
    """The prefix difference under which most names are there; none if that does as well.

    Args:
        names: module paths in an adapter's language.
        roots: first segments of what the base has.
        has: whether the base has a module of this path.
    """
    paths = list(names)
    plain = {path: has(path) for path in paths}
    scores = {Bridge(): sum(plain.values())}
    under: dict[str, list[str]] = {}
    for path in paths:
        if "." in path:
            under.setdefault(path.split(".")[0], []).append(path)
    for root in sorted(under):  # only the names under it change
        bridge = Bridge(strip=root)
        gain = sum(has(bridge.to_base(path)) - plain[path] for path in under[root])
        scores[bridge] = scores[Bridge()] + gain
    for root in sorted(set(roots) - {""}):
        bridge = Bridge(add=root)
        scores[bridge] = sum(has(bridge.to_base(path)) for path in paths)
    return max(scores, key=lambda bridge: scores[bridge])


def renamed_modules(
    directory: Path, config: Mapping[str, Any], tensors: Collection[str]
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
    family: Any = getattr(transformers, architecture_of(config) or "", None)
    is_model = isinstance(family, type) and issubclass(family, transformers.PreTrainedModel)
    if not is_model or _most_parts(config) > len(tensors):
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
    found = {}
    for stored in tensors:
        loaded, converter = rename_source_key(stored, renamings, converters)
        path, _, leaf = loaded.rpartition(".")
        old, _, old_leaf = stored.rpartition(".")
        if converter is None and path != old and leaf == old_leaf:
            found[path] = old
    return found


def _most_parts(config: Mapping[str, Any]) -> int:
    """The largest number of layers, blocks or experts in a config, nested ones included.

    A config that names more of them than there are tensors might take for ever to build.
    """
    numbers = [0]
    for key, value in config.items():
        if isinstance(value, Mapping):
            numbers.append(_most_parts(value))
        elif any(part in key for part in ("layer", "block", "expert", "depth")):
            numbers += value if isinstance(value, list) else [value]
    return max(number for number in numbers if isinstance(number, int))
