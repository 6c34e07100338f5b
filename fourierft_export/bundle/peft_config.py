"""Reads PEFT's adapter_config.json, writes one for a bundle, and stores one in few bytes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..files import strict_json
from ..files.safetensors_reader import read_file
from ..files.strict_json import canonical
from .spec import AdapterSpec, number_offenders

PEFT_TYPE = "FOURIERFT"
_NULL_FIELDS = (
    "auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save",
    "revision", "target_modules",
)  # fmt: skip
_OTHER_FIELDS = (
    "base_model_name_or_path", "r", "lora_alpha", "n_frequency", "scaling", "random_loc_seed",
    "wavelet_family", "use_idwt",
)  # fmt: skip
"""Fields of other PEFT adapters that an error quotes, to say what the folder holds."""
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def read_peft_config(path: Path) -> dict[str, Any]:
    """Reads the adapter_config.json of a FourierFT adapter; every field stays as written."""
    config = strict_json.loads(read_file(path), os.fspath(path))
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != PEFT_TYPE:
        # WaveFT draws its entries as FourierFT does, but they are coefficients of wavelets.
        held = [
            f"{k} {config[k]}" for k in _OTHER_FIELDS if isinstance(config, dict) and k in config
        ]
        raise BadInputError(
            path,
            expected="a PEFT adapter of type FOURIERFT",
            found=f"type {kind}" + (f" ({', '.join(held)[:200]})" if held else ""),
            remedy="its change of the weights is no sparse Fourier spectrum: merge it with PEFT "
            "(merge_and_unload) and use the merged model as a base",
        )
    seed, scaling = config.get("random_loc_seed", 777), config.get("scaling", 150.0)
    offenders = list(number_offenders(seed, scaling))
    for key in ("task_type", "base_model_name_or_path"):
        if not isinstance(config.get(key), (str, type(None))):
            offenders.append(f"{key}: text or null expected")
    if offenders:
        raise BadInputError(
            path, expected="fields as PEFT writes them", found=offenders[0], offenders=offenders[1:]
        )
    return dict(config)


def template(spec: AdapterSpec) -> dict[str, Any]:
    """The config that a spec suggests (FORMAT.md, section PEFT)."""
    counts = Counter(layer.n_frequency for layer in spec.layers)
    commonest = min(counts, key=lambda n: (-counts[n], n)) if counts else 1000
    return dict.fromkeys(_NULL_FIELDS) | {
        "base_model_name_or_path": spec.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": False,
        "n_frequency": commonest,
        "n_frequency_pattern": {},
        "peft_type": PEFT_TYPE,
        "random_loc_seed": spec.seed,
        "scaling": spec.scaling,
        "task_type": spec.task_type,
    }


def config_difference(spec: AdapterSpec) -> dict[str, Any]:
    """How a spec's config differs from its template: fields to `set`, and `absent` ones."""
    likely = template(spec)
    differing = {
        key: value
        for key, value in spec.peft_config.items()
        if key not in likely or canonical(value) != canonical(likely[key])  # not 1 == 1.0
    }
    absent = sorted(set(likely) - set(spec.peft_config))
    return {key: part for key, part in (("set", differing), ("absent", absent)) if part}


def restore_config(
    spec: AdapterSpec, differing: Mapping[str, Any], absent: Sequence[str]
) -> dict[str, Any]:
    """The config with this difference from its template, keys sorted."""
    likely = {key: value for key, value in template(spec).items() if key not in absent}
    return dict(sorted({**likely, **differing}.items()))


def config_of(spec: AdapterSpec, saved: Iterable[str]) -> Mapping[str, Any]:
    """The adapter_config.json for a bundle with these saved tensors: its own or a new one."""
    if spec.peft_config:
        return spec.peft_config
    likely = template(spec)
    owners = {name: name.rpartition(".")[0] for name in saved}
    modules = {owner for name, owner in owners.items() if not name.endswith(".bias")}
    named = {_saved_whole(module, spec.task_type) for module in modules}
    # PEFT cannot open a directory that names a module within a saved one.
    whole = {name for name in named if not any(name.startswith(f"{other}.") for other in named)}
    biases = {
        owner
        for owner in owners.values()
        if not any(f"{owner}.".startswith(f"{name}.") for name in whole)
    }
    targets = {layer.name: layer.n_frequency for layer in spec.layers}
    return {
        **likely,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in spec.layers),
        # A pattern, since in a list PEFT matches the ends of paths: "0" would be every "x.0".
        "target_modules": "|".join(map(re.escape, targets)),
        "n_frequency_pattern": _n_frequency_pattern(targets, likely["n_frequency"]),
        "modules_to_save": sorted(whole) or None,
        "bias": "none" if not biases else "fourier_only" if biases <= set(targets) else "all",
    }


def _n_frequency_pattern(targets: Mapping[str, int], usual: int) -> dict[str, int]:
    """Layer -> n where it is not the usual one, so that PEFT finds the same n for every layer.

    PEFT takes the first key, a regular expression, with which a path ends after a dot.
    """
    pattern = {name: n for name, n in targets.items() if n != usual}
    exact: dict[str, int] = {}
    for name, n in targets.items():
        parts = name.split(".")
        ends = (i for i in range(1, len(parts)) if ".".join(parts[i:]) in pattern)
        if any(pattern[".".join(parts[i:])] != n for i in ends):
            # `lin` would match `a.lin`: this key matches the whole path, and sorts first.
            exact[f"(?<=^{re.escape(name[: -len(parts[-1])])}){re.escape(parts[-1])}"] = n
    return exact | pattern


def _saved_whole(module: str, task_type: str | None) -> str:
    """The module that PEFT saves for `module`: the task's head around it, if there is one."""
    heads = _TASK_HEADS.get(task_type or "", ())
    segments = module.split(".")
    inside = (i for i, segment in enumerate(segments) if heads and segment.endswith(heads))
    return ".".join(segments[: next(inside, len(segments)) + 1])
