"""Maps an adapter's names to those of a base.

They may differ by one prefix: the adapter was trained on a task model (`bert.encoder...`) and the
base is the bare encoder (`encoder...`), or the reverse. And transformers renames tensors of some
families while loading: the module `layers.0.attention.q_proj` of a vision transformer is stored as
`encoder.layer.0.attention.attention.query`.
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
    """The difference between an adapter's names and a checkpoint's.

    Attributes:
        strip: prefix that the adapter has and the checkpoint lacks ("bert"), or "".
        add: prefix that the checkpoint has and the adapter lacks, or "".
        renamed: module path -> path in the checkpoint, without prefixes (`renamed_modules`).
    """

    strip: str = ""
    add: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_base(self, name: str) -> str:
        """Maps an adapter's module path or tensor name to the checkpoint's."""
        if self.strip and name.startswith(f"{self.strip}."):
            name = name[len(self.strip) + 1 :]
        elif self.add:
            name = f"{self.add}.{name}"
        path, dot, leaf = name.rpartition(".")
        return self.renamed.get(name) or self.renamed.get(path, path) + dot + leaf


def find_bridge(names: Iterable[str], roots: Iterable[str], has: Callable[[str], bool]) -> Bridge:
    """Finds the prefix difference under which the base has most names; none if that is as good.

    Args:
        names: module paths of an adapter.
        roots: first segments of the base's names.
        has: returns whether the base has a module at a path.
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
        if any(bridge.to_base(path) in plain for path in under[root]):
            continue  # two of the names would become one
        gain = sum(has(bridge.to_base(path)) - plain[path] for path in under[root])
        scores[bridge] = scores[Bridge()] + gain
    for root in sorted(set(roots) - {""}):
        bridge = Bridge(add=root)
        scores[bridge] = sum(has(bridge.to_base(path)) for path in paths)
    return max(scores, key=lambda bridge: scores[bridge])


def renamed_modules(
    directory: Path, config: Mapping[str, Any], tensors: Collection[str]
) -> dict[str, str]:
    """Maps module paths of a loaded Hugging Face model to those in its checkpoint that differ.

    Tensors that transformers merges or splits are left out, and models that it does not know.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {}
    model = _model_without_weights(directory, config, tensors)
    if model is None:
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


def input_embedding_of(
    directory: Path, config: Mapping[str, Any], tensors: Collection[str]
) -> str | None:
    """Finds the tensor name of the input embedding in a loaded model, as `renamed_modules`."""
    model = _model_without_weights(directory, config, tensors)
    if model is None:
        return None
    embedding = model.get_input_embeddings()
    paths = (path for path, module in model.named_modules() if module is embedding)
    return next((f"{path}.weight" for path in paths), None)


def _model_without_weights(
    directory: Path, config: Mapping[str, Any], tensors: Collection[str]
) -> Any:
    """Builds the model that a config names on the meta device; None if that is not possible."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    family: Any = getattr(transformers, architecture_of(config) or "", None)
    is_model = isinstance(family, type) and issubclass(family, transformers.PreTrainedModel)
    # A model with more layers than the checkpoint has tensors might take hours to build.
    if not is_model or _most_parts(config) > len(tensors):
        return None
    # No names can be known for a config that transformers cannot build a model of; whoever loads
    # the model reports that. The code of each family raises what it happens to meet.
    try:
        with quiet_transformers(), torch.device("meta"):
            known = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            return family(known)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a division by zero, an assertion, validators' own errors
        return None


def _most_parts(config: Mapping[str, Any]) -> int:
    """The largest number of layers, blocks or experts in a config, nested ones included."""
    numbers = [0]
    for key, value in config.items():
        if isinstance(value, Mapping):
            numbers.append(_most_parts(value))
        elif any(part in key for part in ("layer", "block", "expert", "depth")):
            numbers += value if isinstance(value, list) else [value]
    return max(number for number in numbers if isinstance(number, int))
