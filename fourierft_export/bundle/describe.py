"""What bundles and PEFT adapter directories hold, as JSON values for reports and `inspect`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files import dtypes
from . import layer_templates as names
from .bundle import Bundle
from .peft import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_adapter
from .peft_config import read_peft_config
from .pool import Pool


def describe_bundle(bundle: Bundle, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Describes a bundle as JSON values, with the size of its file if there is one."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for layer in bundle.layers:
        facts = {
            "n_frequency": layer.n_frequency,
            "shape": None if layer.shape is None else list(layer.shape),
            "dtype": dtypes.to_name(bundle.spectra[layer.name].dtype),
            "entry_rule": layer.entry_rule,
            "fan_in_fan_out": layer.fan_in_fan_out,
        }
        base_dtype = layer.fingerprint.dtype if layer.fingerprint else None
        members, _ = groups.setdefault(str(facts), ([], facts | {"base_dtype": base_dtype}))
        members.append(layer.name)
    return {
        "kind": "bundle",
        "path": None if path is None else os.fspath(path),
        "bytes": len(bundle.to_bytes()) if path is None else os.stat(path).st_size,
        "sha256": bundle.sha256,
        "bound": bundle.is_bound,
        "seed": bundle.spec.seed,
        "scaling": bundle.spec.scaling,
        "task_type": bundle.spec.task_type,
        "base_model": bundle.spec.base_model,
        "layers": len(bundle.layers),
        "coefficients": sum(layer.n_frequency for layer in bundle.layers),
        "groups": [
            {"layers": names.compress(members), "count": len(members), **facts}
            for members, facts in groups.values()
        ],
        "saved": [
            {"name": name, "dtype": dtypes.to_name(array.dtype), "shape": list(array.shape)}
            for name, array in bundle.saved.items()
        ],
    }


def describe_adapter(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes a PEFT FourierFT adapter directory as JSON values; without weights, its config."""
    folder = find_adapter(directory)
    weights = folder / WEIGHTS_FILE
    facts: dict[str, Any] = {"bytes": 0, "layers": 0, "coefficients": 0, "groups": [], "saved": []}
    if weights.exists():
        described = describe_bundle(read_adapter(folder))
        facts = {key: described[key] for key in facts} | {"bytes": weights.stat().st_size}
    config = read_peft_config(folder / CONFIG_FILE)
    return {"kind": "adapter", "path": os.fspath(folder), "config": config} | facts


def describe_adapter_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes an adapter_config.json without its directory, as JSON values."""
    config = read_peft_config(Path(path))
    return {"kind": "adapter-config", "path": os.fspath(path), "config": config}


def describe_pool(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes a pool as JSON values: its size, its first adapters, and what one of them holds."""
    with Pool(path) as pool:
        names = list(pool)
        first = [(name, pool[name].sha256) for name in names[:20]]
        facts = describe_bundle(pool[names[0]]) if names else {}
    return {
        "kind": "pool",
        "path": os.fspath(path),
        "bytes": os.stat(path).st_size,
        "adapters": len(names),
        "names": names,
        "first": first,
        "base_model": facts.get("base_model"),
        "groups": facts.get("groups", []),
        "saved": facts.get("saved", []),
    }
