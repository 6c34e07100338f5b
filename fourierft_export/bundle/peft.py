"""Reads and writes PEFT FourierFT adapter directories without importing peft.

Layers are read from the tensor names, never from the config's patterns: a regular expression in an
untrusted file can run for years. (File layout: peft/utils/save_and_load.py.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable
from pathlib import Path

from safetensors.numpy import save

from ..errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from ..files import strict_json
from ..files.checkpoint import Checkpoint
from ..files.hub import local_adapter
from ..files.safe_paths import check_path
from ..files.staging import check_output, staged_directory
from ..models.base_tensors import Base
from ..types import Array
from .bundle import Bundle
from .peft_config import config_of, read_peft_config
from .pool import open_from_pool
from .spec import EXPLICIT_RULE, AdapterSpec, LayerSpec

DEFAULT_ADAPTER = "default"  # the one that PEFT saves into the folder itself
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
SPECTRUM = ".fourierft_spectrum"
BASE_LAYER = ".base_layer"

BundleSource = Bundle | str | os.PathLike[str]
"""A bundle, or the path or Hub id of a bundle file or a PEFT adapter directory, or POOL#NAME."""


def open_bundle(source: BundleSource, *, bind: bool = False) -> Bundle:
    """Opens a bundle file or a PEFT adapter directory; a bundle is returned as it is.

    Args:
        source: a bundle or a path.
        bind: bind an adapter directory to the base that its config names (see `from_peft`).
    """
    if isinstance(source, Bundle):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(
            "opening a bundle",
            expected="a bundle, or the path of a bundle file or of a PEFT adapter directory",
            found=type(source).__name__,
        )
    source = local_adapter(source)
    if not os.path.isdir(source):
        return open_from_pool(source) or Bundle.load(source)
    return from_peft(source) if bind else read_adapter(find_adapter(source))


def list_bundles(sources: BundleSource | Iterable[BundleSource]) -> list[BundleSource]:
    """One bundle or path, or several, as a list; nothing is opened."""
    return [sources] if isinstance(sources, (Bundle, str, os.PathLike)) else list(sources)


def find_adapter(directory: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """Finds the folder with adapter_config.json: `directory` or its subfolder `adapter`."""
    root = Path(local_adapter(directory))
    if not root.exists():
        raise FileAccessError(root, expected="a PEFT adapter directory", found="nothing there")
    if not root.is_dir():
        raise BadInputError(
            root,
            expected="a PEFT adapter directory",
            found="a file",
            remedy="for a state dict of the paper's own code, give pack --paper-scaling",
        )
    inside = sorted(p.parent.name for p in root.glob(f"*/{CONFIG_FILE}"))
    if adapter is None and (root / CONFIG_FILE).is_file():
        return root
    if adapter is None and not inside:
        raise BadInputError(
            root,
            expected=f"a PEFT adapter directory with {CONFIG_FILE}",
            found="no such file",
            remedy="give the directory that PEFT's save_pretrained wrote",
        )
    if adapter == DEFAULT_ADAPTER and adapter not in inside and (root / CONFIG_FILE).is_file():
        return root
    named = [name for name in inside if adapter in (None, name)]
    if len(named) != 1:
        one = "one adapter" if adapter is None else f"an adapter in the subfolder {adapter!r}"
        found = ("several: " if adapter is None else "") + ", ".join(inside)
        found = found or "no adapters in subfolders"
        raise UsageError(root, expected=one, found=found, remedy="name one with --adapter")
    return root / named[0]


def from_peft(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | Base | None = None,
    *,
    adapter: str | None = None,
    entry_rule: str | None = None,
) -> Bundle:
    """Reads a PEFT FourierFT adapter directory as a bundle; every tensor stays bit for bit.

    Args:
        directory: what `PeftModel.save_pretrained` wrote, or a folder of such folders.
        base: the checkpoint to bind the bundle to (`Bundle.bind`); without it the bundle is
            unbound, unless the config's base_model_name_or_path is a local directory that fits.
        adapter: the subfolder, if the directory holds several adapters.
        entry_rule: "small" for adapters of large layers trained before torch 2.6.

    Returns:
        The bundle.

    Raises:
        FileAccessError, BadInputError, UsageError: the directory is not a FourierFT adapter.
        BaseMismatchError: the base lacks layers, or they do not fit.
    """
    check_path(directory)
    bundle = read_adapter(find_adapter(directory, adapter))
    if base is not None:
        return bundle.bind(base, entry_rule)
    if entry_rule is not None:
        raise UsageError(
            "entry rule",
            expected="a base: the rule is stored together with the layers' shapes",
            found="none",
            remedy="give --base DIR (base=...) together with --entry-rule",
        )
    implied = bundle.spec.base_model
    if not implied or not os.path.isfile(os.path.join(implied, "config.json")):
        return bundle
    try:
        return bundle.bind(implied)
    except (BadInputError, BaseMismatchError, FileAccessError):
        # The user did not name this base: the folder may hold another model, or pickled weights.
        return bundle


def read_adapter(folder: Path) -> Bundle:
    """Reads the adapter in `folder` as an unbound bundle; no base is opened."""
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
    foreign = [name for name in checkpoint.tensors if not name.startswith(PREFIX)]
    names = {name.removeprefix(PREFIX): name for name in checkpoint.tensors}
    targets = [name.removesuffix(SPECTRUM) for name in names if name.endswith(SPECTRUM)]
    if foreign or not targets:
        raise BadInputError(
            weights,
            expected=f"tensors {PREFIX}<module>{SPECTRUM}",
            found=f"{len(foreign)} with other names" if foreign else "none",
            remedy="the file was not saved by PEFT from a FourierFT model: save the adapter again",
            offenders=foreign,
        )
    spectra = {layer: checkpoint.read(names.pop(f"{layer}{SPECTRUM}")) for layer in targets}
    saved: dict[str, Array] = {}
    for name, stored in names.items():
        if not _is_extra(name, names):
            module, _, leaf = name.rpartition(".")
            owner = module.removesuffix(BASE_LAYER)
            plain = f"{owner if owner in spectra else module}.{leaf}"
            if plain in saved:
                raise BadInputError(
                    weights,
                    expected="each tensor once",
                    found=f"{plain} twice, with and without {BASE_LAYER}",
                    remedy="the file was not saved by PEFT: save the adapter again",
                )
            saved[plain] = checkpoint.read(stored)
    empty = [name for name, array in (*spectra.items(), *saved.items()) if array.size == 0]
    if empty:
        raise BadInputError(
            weights,
            expected="tensors with values",
            found=f"{len(empty)} empty tensors, as DeepSpeed ZeRO-3 leaves where it was not asked "
            "to gather the weights",
            remedy="save again with stage3_gather_16bit_weights_on_model_save, or within "
            "deepspeed.zero.GatheredParameters",
            offenders=empty,
        )
    spec = AdapterSpec(
        seed=config.get("random_loc_seed", 777),
        scaling=config.get("scaling", 150.0),
        layers=tuple(LayerSpec(name, spectrum.size) for name, spectrum in spectra.items()),
        task_type=config.get("task_type"),
        base_model=config.get("base_model_name_or_path"),
        peft_config=config,
    )
    return Bundle.build(spec, spectra, saved, where=os.fspath(weights))


def left_out(directory: str | os.PathLike[str], adapter: str | None = None) -> list[str]:
    """Names of tensors that `from_peft` skips: the base's own weights, and second copies.

    PEFT saves weights of the base if an output embedding is targeted
    (`lm_head.base_layer.weight`), and with bias="all" the biases of a saved module three times.
    """
    weights = find_adapter(directory, adapter) / WEIGHTS_FILE
    names = Checkpoint.open(weights).tensors
    return [name for name in names if _is_extra(name, names)]


def _is_extra(name: str, names: Container[str]) -> bool:
    """Whether a tensor is the base's weight, or PEFT's second copy of another one in `names`."""
    copy_of = re.sub(r"\.(modules_to_save|original_module)\.(\w+)$", r".\2", name)
    return name.endswith(f"{BASE_LAYER}.weight") or (copy_of != name and copy_of in names)


def to_peft(
    bundle: BundleSource, directory: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Writes a bundle as a directory that PEFT loads.

    A bundle that came from PEFT gives back every tensor bit for bit and every config field.
    Another one gets a config that names its layers one by one.

    Args:
        bundle: a `Bundle`, or the path of a bundle file or of another PEFT adapter directory.
        directory: to write: adapter_config.json and adapter_model.safetensors.
        force: replace an existing directory.

    Returns:
        The directory written.

    Raises:
        UsageError: it exists, without `force`; or the bundle's entries follow from no seed (as
            after `combine`), so that PEFT would draw others.
        FileAccessError: it cannot be written.

    Example:
        >>> import fourierft_export as ff, tempfile, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> bundle = ff.capture(model)
        >>> directory = ff.to_peft(bundle, tempfile.mkdtemp() + "/adapter")
        >>> sorted(file.name for file in directory.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> bool((ff.from_peft(directory).spectra["0"] == bundle.spectra["0"]).all())
        True
    """
    check_output(directory, force=force, inputs=(bundle,))
    bundle = open_bundle(bundle)
    explicit = [layer.name for layer in bundle.layers if layer.entry_rule == EXPLICIT_RULE]
    if explicit:
        raise UsageError(
            "writing a PEFT adapter",
            expected="entries that follow from the seed, as PEFT draws them",
            found=f"{len(explicit)} layers with entries of their own ({explicit[0]}, ...)",
            remedy="merge the bundle, or export it to ONNX; PEFT cannot hold these entries",
        )
    tensors: dict[str, Array] = {
        f"{PREFIX}{name}{SPECTRUM}": spectrum for name, spectrum in bundle.spectra.items()
    }
    for name, tensor in bundle.saved.items():
        tensors[f"{PREFIX}{peft_name(bundle, name)}"] = tensor
    config = strict_json.pretty(dict(config_of(bundle.spec, bundle.saved)))
    with staged_directory(directory, force=force) as folder:
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
    return Path(directory)


def peft_name(bundle: Bundle, name: str) -> str:
    """PEFT's name for a saved tensor: it keeps a targeted layer's own parameters one level down."""
    module, _, leaf = name.rpartition(".")
    return f"{module}{BASE_LAYER}.{leaf}" if module in bundle.spectra else name
