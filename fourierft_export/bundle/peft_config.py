"""A PEFT adapter_config.json in few bytes, and back field for field.

Most fields of most configs say what PEFT writes by default, or what the bundle's spec says anyway.
Only the others are stored: `set` holds fields that differ, `absent` names fields that are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..files.strict_json import canonical
from .spec import AdapterSpec

PEFT_TYPE = "FOURIERFT"


def template(spec: AdapterSpec) -> dict[str, Any]:
    """The config that an adapter of this spec most likely came with (FORMAT.md, section PEFT)."""
    counts = Counter(layer.n_frequency for layer in spec.layers)
    # The commonest is what the config says for all layers; of several, the smallest.
    commonest = min(counts, key=lambda n: (-counts[n], n)) if counts else 1000
    return {
        "auto_mapping": None,
        "base_model_name_or_path": spec.base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": False,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "n_frequency": commonest,
        "n_frequency_pattern": {},
        "peft_type": PEFT_TYPE,
        "random_loc_seed": spec.seed,
        "revision": None,
        "scaling": spec.scaling,
        "target_modules": None,
        "task_type": spec.task_type,
    }


def shorten(config: Mapping[str, Any], likely: Mapping[str, Any]) -> dict[str, Any]:
    """What of `config` the template `likely` does not say. Values are equal if their JSON is."""
    differing = {
        key: value
        for key, value in config.items()
        if key not in likely or canonical(value) != canonical(likely[key])
    }
    absent = sorted(set(likely) - set(config))
    return {key: part for key, part in (("set", differing), ("absent", absent)) if part}


def restore(
    differing: Mapping[str, Any], absent: Sequence[str], likely: Mapping[str, Any]
) -> dict[str, Any]:
    """The inverse of `shorten`, from its two parts; keys are sorted."""
    config = {key: value for key, value in likely.items() if key not in absent}
    config.update(differing)
    return dict(sorted(config.items()))
