"""PEFT FourierFT adapter directories <-> bundles, without importing peft.

The layers come from the tensor names, never from the config's patterns: a regular expression in a
file that somebody else made can run for years. (File layout: peft/utils/save_and_load.py.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from ..files import dtypes, strict_json
from ..files.checkpoint import Checkpoint
from ..files.container import encode_header, read_file
from ..files.staging import staged_directory
from ..models.base import Base, open_base
from ..types import Array
from . import peft_config
from .file import Bundle
from .spec import AdapterSpec, LayerSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
SPECTRUM = ".fourierft_spectrum"
BASE_LAYER = ".base_layer"
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def find_adapter(directory: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """The folder that holds adapter_config.json: `directory` itself or its subfolder `adapter`.

    Raises:
        FileAccessError: the path does not exist.
        UsageError: several adapters in subfolders and none named, or the named one is absent.
        BadInputError: no adapter there.
    """
    root = Path(directory)
    if not root.exists():
        raise FileAccessError(root, expected="a PEFT adapter directory", found="nothing there")
    if not root.is_dir():
        raise BadInputError(root, expected="a PEFT adapter directory", found="a file")
    inside = sorted(p.parent.name for p in root.glob(f"*/{CONFIG_FILE}"))
    if adapter is not None:
        if adapter not in inside:
            raise UsageError(
                root,
                expected=f"an adapter in the subfolder {adapter!r}",
                found=", ".join(inside) or "no adapters in subfolders",
                remedy="name one that is there with --adapter",
            )
        return root / adapter
    if (root / CONFIG_FILE).is_file():
        return root
    if len(inside) == 1:
        return root / inside[0]
    if inside:
        raise UsageError(
            root,
            expected="one adapter",
            found=f"several: {', '.join(inside)}",
            remedy="name one with --adapter",
        )
    raise BadInputError(
        root,
        expected=f"a PEFT adapter directory with {CONFIG_FILE}",
        found="no such file",
        remedy="give the directory that save_pretrained wrote",
    )


def read_peft_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json of a FourierFT adapter, every field as written.

    Raises:
        BadInputError: not FourierFT (the type is named), or fields that make no sense.
    """
    config = strict_json.loads(read_file(path), os.fspath(path))
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != peft_config.PEFT_TYPE:
        raise BadInputError(
            path,
            expected="a PEFT adapter of type FOURIERFT",
            found=f"type {kind}",
            remedy="this toolkit handles FourierFT adapters only",
        )
    seed, scaling = config.get("random_loc_seed", 777), config.get("scaling", 150.0)
    offenders = []
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        offenders.append(f"random_loc_seed {str(seed)[:40]}: a whole number of 64 bits expected")
    if type(scaling) not in (int, float) or abs(scaling) >= 2**127 or not isfinite(scaling):
        offenders.append(f"scaling {str(scaling)[:40]}: a finite float32 number expected")
    for key in ("task_type", "base_model_name_or_path"):
        if not isinstance(config.get(key), (str, type(None))):
            offenders.append(f"{key}: text or null expected")
    if offenders:
        raise BadInputError(
            path, expected="fields as PEFT writes them", found=offenders[0], offenders=offenders[1:]
        )
    return dict(config)


def from_peft(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | Base | None = None,
    *,
    adapter: str | None = None,
    entry_rule: str | None = None,
) -> Bundle:
    """A bundle of a PEFT FourierFT adapter, every tensor bit for bit.

    Args:
        directory: what `PeftModel.save_pretrained` wrote, or a folder of such folders.
        base: binds the bundle (`Bundle.bind`); without it the bundle is unbound, unless the
            config's base_model_name_or_path is a readable local directory that fits.
        adapter: subfolder, for a directory with several adapters.
        entry_rule: "small" for adapters of large layers trained before torch 2.6.

    Raises:
        FileAccessError, BadInputError, UsageError: the directory is not a FourierFT adapter.
        BaseMismatchError: the base lacks layers, or they do not fit.
    """
    bundle = read_adapter(find_adapter(directory, adapter))
    if base is not None:
        return bundle.bind(base, entry_rule)
    implied = _local_base(bundle.spec.base_model)
    if implied is None:
        return bundle
    try:
        return bundle.bind(implied, entry_rule)
    except BaseMismatchError:
        # Nobody asked for this base: a folder that happens to have its name settles nothing.
        return bundle


def read_adapter(folder: Path) -> Bundle:
    """The unbound bundle of the adapter in `folder`; no base is looked at.

    Raises:
        FileAccessError, BadInputError: it is not a FourierFT adapter.
    """
    config = read_peft_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.exists() and (folder / PICKLED_WEIGHTS).exists():
        raise BadInputError(
            folder / PICKLED_WEIGHTS,
            expected=WEIGHTS_FILE,
            found="a pickle, which can run code when it is loaded",
            remedy="load it with peft where it was made and save it with safe_serialization=True",
        )
    checkpoint = Checkpoint.open(weights)
    spectra, saved, targets = _sort_tensors(checkpoint, weights)
    seed = config.get("random_loc_seed", 777)
    spec = AdapterSpec(
        seed=seed,
        scaling=config.get("scaling", 150.0),
        layers=tuple(LayerSpec(name, spectra[name].size) for name in targets),
        task_type=config.get("task_type"),
        base_model=config.get("base_model_name_or_path"),
        peft_config=config,
    )
    return Bundle.build(spec, spectra, saved, where=os.fspath(weights))


def left_out(directory: str | os.PathLike[str], adapter: str | None = None) -> list[str]:
    """Tensors that `from_peft` does not take: base weights, which the base has anyway.

    PEFT saves them when an output embedding is targeted (`lm_head.base_layer.weight`).
    """
    weights = find_adapter(directory, adapter) / WEIGHTS_FILE
    return [name for name in Checkpoint.open(weights).tensors if _is_base_weight(name)]


def _is_base_weight(name: str) -> bool:
    return name.endswith(f"{BASE_LAYER}.weight")


def _local_base(path: str | None) -> Base | None:
    """base_model_name_or_path if it is a readable model directory on this machine."""
    if not path or not os.path.isfile(os.path.join(path, "config.json")):
        return None
    try:
        return open_base(path)
    except (BadInputError, FileAccessError):  # pickled weights, say: nobody asked for this base
        return None


def _sort_tensors(
    checkpoint: Checkpoint, where: Path
) -> tuple[dict[str, Array], dict[str, Array], list[str]]:
    """The adapter's spectra by layer, its dense tensors by plain name, and the layers' names."""
    strange = [name for name in checkpoint.tensors if not name.startswith(PREFIX)]
    names = [name.removeprefix(PREFIX) for name in checkpoint.tensors]
    targets = [name.removesuffix(SPECTRUM) for name in names if name.endswith(SPECTRUM)]
    if strange or not targets:
        raise BadInputError(
            where,
            expected=f"tensors {PREFIX}<module>{SPECTRUM}",
            found=f"{len(strange)} with other names" if strange else "none",
            remedy="the file was not saved by PEFT from a FourierFT model",
            offenders=strange,
        )
    spectra, saved = {}, {}
    owners = set(targets)
    for stored, name in zip(checkpoint.tensors, names, strict=True):
        if name.endswith(SPECTRUM):
            spectra[name.removesuffix(SPECTRUM)] = checkpoint.read(stored)
        elif not _is_base_weight(name):
            module, _, leaf = name.rpartition(".")
            owner = module.removesuffix(BASE_LAYER)
            saved[f"{owner if owner in owners else module}.{leaf}"] = checkpoint.read(stored)
    return spectra, saved, targets


def to_peft(bundle: Bundle, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a bundle as a directory that PEFT loads.

    A bundle that came from PEFT gives back every tensor bit for bit and every config field as it
    was. One that did not gets a config that names its layers one by one.

    Returns:
        The directory written.

    Raises:
        UsageError: it exists, without `force`.
        FileAccessError: it cannot be written.
    """
    tensors: dict[str, Array] = {
        f"{PREFIX}{name}{SPECTRUM}": spectrum for name, spectrum in bundle.spectra.items()
    }
    for name, tensor in bundle.saved.items():
        module, _, leaf = name.rpartition(".")
        # PEFT keeps a targeted layer's own parameters one level down.
        stored = f"{module}{BASE_LAYER}.{leaf}" if module in bundle.spectra else name
        tensors[f"{PREFIX}{stored}"] = tensor
    # By falling element size, so that every tensor is aligned: torch refuses others.
    names = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    table = [(n, dtypes.to_name(tensors[n].dtype), tensors[n].shape) for n in names]
    with staged_directory(directory, force=force) as folder:
        config = strict_json.pretty(dict(peft_config_of(bundle)))
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        with open(folder / WEIGHTS_FILE, "wb") as file:
            file.write(encode_header(table, {"format": "pt"}))
            for name in names:
                file.write(np.ascontiguousarray(tensors[name]).tobytes())
    return Path(directory)


def peft_config_of(bundle: Bundle) -> Mapping[str, Any]:
    """The adapter_config.json of a bundle: the one it came with, or one made from its spec."""
    if bundle.spec.peft_config:
        return bundle.spec.peft_config
    config = peft_config.template(bundle.spec)
    usual = config["n_frequency"]
    modules = sorted(
        {name.rpartition(".")[0] for name in bundle.saved if not name.endswith(".bias")}
    )
    return {
        **config,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in bundle.layers),
        # A pattern, since PEFT takes names in a list for endings, too: "0" would be every "x.0".
        "target_modules": "|".join(re.escape(layer.name) for layer in bundle.layers),
        "n_frequency_pattern": {
            layer.name: layer.n_frequency for layer in bundle.layers if layer.n_frequency != usual
        },
        "modules_to_save": sorted({_saved_whole(m, bundle.spec.task_type) for m in modules})
        or None,
        "bias": _bias_mode(bundle, modules),
    }


def _saved_whole(module: str, task_type: str | None) -> str:
    """The module that PEFT saves for `module`: the task's head around it, if there is one.

    PEFT adds these heads by itself, and cannot save a module within a saved one.
    """
    heads = _TASK_HEADS.get(task_type or "", ())
    segments = module.split(".")
    inside = (i for i, segment in enumerate(segments) if heads and segment.endswith(heads))
    return ".".join(segments[: next(inside, len(segments)) + 1])


def _bias_mode(bundle: Bundle, saved_modules: list[str]) -> str:
    """PEFT's `bias` under which it would have saved this bundle's biases."""
    owners = {n.rpartition(".")[0] for n in bundle.saved if n.endswith(".bias")}
    trained = owners - set(saved_modules)
    if not trained:
        return "none"
    return "fourier_only" if trained <= set(bundle.spectra) else "all"
