"""Reads adapters that the paper's own code trained (github.com/Chaos96/fourierft), as bundles.

That code is a fork of PEFT with another layout (peft/src/peft/tuners/fourier/layer.py there): the
seed is 2024 for all layers, layers are square, and the forward pass computes x @ delta_W, where
PEFT computes x @ delta_W.T. So the same spectrum, read by PEFT's rules, gives the transposed
change. A bundle holds it as explicit entries with rows and columns exchanged, since the transpose
of Re(ifft2(F)) is Re(ifft2(F.T)).
"""

from __future__ import annotations

import os
from dataclasses import replace

from ..errors import BadInputError
from ..files.checkpoint import Checkpoint
from ..models.base_tensors import Base
from ..spectral.entries import entries_sha256
from ..types import Array
from .bundle import Bundle
from .peft import DEFAULT_ADAPTER, PREFIX
from .spec import EXPLICIT_RULE, AdapterSpec, LayerSpec

SPECTRUM = ".spectrum."
SAVED = ".modules_to_save."


def from_paper(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | Base,
    *,
    scaling: float,
    seed: int = 2024,
    adapter: str = DEFAULT_ADAPTER,
) -> Bundle:
    """Reads a state dict of the paper's own code as a bundle.

    That code's `save_pretrained` leaves the spectra out, so the file is a whole state dict
    (`safetensors.torch.save_file(model.state_dict(), path)`) or the spectra and heads out of one.

    Args:
        path: a safetensors file with tensors `base_model.model.<layer>.spectrum.<adapter>`.
        base: the checkpoint that the adapter was trained on.
        scaling: the `--scale` of the training. (The fork's `merge` uses 300 instead, whatever was
            trained, and does not transpose: its merged models differ from its trained ones.)
        seed: the `--entry_seed` of the training.
        adapter: the adapter's name in the file.

    Returns:
        A bundle bound to `base`, with explicit entries.

    Raises:
        FileAccessError, BadInputError: the file cannot be read, or holds no such adapter.
        BaseMismatchError: the base lacks layers, or they are not square.
    """
    checkpoint = Checkpoint.open(path)
    names = {name.removeprefix(PREFIX): name for name in checkpoint.tensors}
    ending = f"{SPECTRUM}{adapter}"
    spectra = {
        name.removesuffix(ending): checkpoint.read(stored)
        for name, stored in names.items()
        if name.endswith(ending)
    }
    if not spectra:
        raise BadInputError(
            path,
            expected=f"tensors {PREFIX}<layer>{ending}",
            found="none",
            remedy="save the whole state dict of the trained model: the paper's code leaves the "
            "spectra out of what save_pretrained writes",
        )
    inside = f"{SAVED}{adapter}."
    saved: dict[str, Array] = {
        name.replace(inside, "."): checkpoint.read(stored)
        for name, stored in names.items()
        if inside in name
    }
    layers = tuple(LayerSpec(name, spectrum.size) for name, spectrum in spectra.items())
    where = os.fspath(path)
    bundle = Bundle.build(AdapterSpec(seed, scaling, layers), spectra, saved, where=where)
    # torch.randperm as it was before torch 2.6, when these adapters were trained.
    bound = bundle.bind(base, "small")
    entries = {layer.name: bound.entries(layer.name)[:, ::-1].copy() for layer in bound.layers}
    oblong = [layer.name for layer in bound.layers if len(set(layer.shape or ())) != 1]
    if oblong:
        raise BadInputError(
            path,
            expected="square layers, the only ones that the paper's code adapts",
            found=f"{len(oblong)} others",
            offenders=oblong,
        )
    explicit = tuple(
        replace(
            layer,
            entry_rule=EXPLICIT_RULE,
            entries_sha256=entries_sha256(entries[layer.name]),
        )
        for layer in bound.layers
    )
    spec = replace(bound.spec, layers=explicit)
    return Bundle.build(spec, bound.spectra, bound.saved, entries, where=where)
