"""What an adapter of a pool shares with others (its template), and its own numbers as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import BadInputError
from ..files import dtypes
from ..types import Array
from .bundle import Bundle
from .file_format import SPEC_KEY, split_file
from .layer_templates import expand
from .spec import EXPLICIT_RULE, RESERVED, LayerSpec, number_offenders

EntryKind = tuple[object, ...]
_ZEROS = "0" * 64
_SEED, _SCALING = "random_loc_seed", "scaling"


@dataclass(frozen=True)
class Template:
    """What many adapters share: everything but seed, scaling, hashes of entries and numbers."""

    bundle: Bundle  # with zeros for numbers
    parts: tuple[tuple[str, np.dtype[np.generic], tuple[int, ...], int], ...]  # of payloads
    rows: Mapping[str, tuple[str, ...]]  # tensor of spectra -> its layers
    kinds: tuple[EntryKind, ...]  # an adapter has one hash of entries for each
    size: int  # of a payload in bytes


def entry_kind(layer: LayerSpec) -> EntryKind:
    """Layers of which this is equal have equal entries, if their seed is."""
    return layer.shape, layer.n_frequency, layer.entry_rule


def make_template(bundle: Bundle) -> Bundle:
    """The bundle with zeros for everything that is the adapter's own."""
    layers = tuple(
        layer if layer.entry_rule == EXPLICIT_RULE else replace(layer, entries_sha256=_ZEROS)
        for layer in bundle.layers
    )
    own = {_SEED: 0, _SCALING: 0} if bundle.spec.peft_config else {}
    config = {key: own.get(key, value) for key, value in bundle.spec.peft_config.items()}
    spec = replace(bundle.spec, seed=0, scaling=0, layers=layers, peft_config=config)
    spectra, saved = (
        {name: np.zeros_like(array) for name, array in held.items()}
        for held in (bundle.spectra, bundle.saved)
    )
    return Bundle.build(spec, spectra, saved, bundle.explicit_entries)


def read_template(data: bytes, where: str) -> Template:
    """Reads a template's bundle file, and where each tensor lies in its adapters' payloads."""
    header, _ = split_file(data, where)
    bundle = Bundle.from_bytes(data, where)
    groups = json.loads(header.metadata[SPEC_KEY])["groups"]
    rows = {
        f"{RESERVED}spectrum.{i}": tuple(expand(group["layers"])) for i, group in enumerate(groups)
    }
    parts, at = [], 0
    for tensor in header.tensors.values():
        if not _is_shared(tensor.name):
            dtype = dtypes.to_numpy(tensor.dtype)
            parts.append((tensor.name, dtype, tensor.shape, at))
            at += prod(tensor.shape) * dtype.itemsize
    drawn = [layer for layer in bundle.layers if layer.entry_rule != EXPLICIT_RULE]
    return Template(bundle, tuple(parts), rows, tuple(dict.fromkeys(map(entry_kind, drawn))), at)


def encode_payload(bundle: Bundle, template: Template) -> bytes:
    """The adapter's own tensors, little-endian, in the order of the template's file."""
    pieces = []
    for name, dtype, _, _ in template.parts:
        if name in template.rows:
            array = np.stack([bundle.spectra[layer] for layer in template.rows[name]])
        else:
            array = bundle.saved[name]
        pieces.append(np.asarray(array, dtype).tobytes())
    return b"".join(pieces)


def decode(template: Template, own: Any, payload: bytes, where: str) -> Bundle:
    """Makes the bundle of an adapter whose template was checked in full."""
    seed, scaling, digests = own if isinstance(own, list) and len(own) == 3 else (None, 0, [])
    kinds = template.kinds
    good = isinstance(digests, list) and [type(d) for d in digests] == [str] * len(kinds)
    if not good or [*number_offenders(seed, scaling)]:
        expected, found = "seed, scaling and hashes of entries", str(own)[:80]
        raise BadInputError(where, expected=expected, found=found)
    hashes = dict(zip(kinds, digests, strict=True))
    spectra: dict[str, Array] = {}
    saved: dict[str, Array] = {}
    for name, dtype, shape, at in template.parts:
        array = np.frombuffer(payload, dtype, prod(shape), at).reshape(shape)
        if name not in template.rows:
            saved[name] = array
            continue
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(array.astype(np.float64, copy=False)).all()
        if not finite:
            raise BadInputError(where, expected="finite spectra", found="NaN or infinity")
        spectra.update(zip(template.rows[name], array, strict=True))
    shared, values = template.bundle.spec, {_SEED: seed, _SCALING: scaling}
    spec = replace(
        shared,
        seed=seed,
        scaling=scaling,
        layers=tuple(
            layer
            if layer.entry_rule == EXPLICIT_RULE
            else replace(layer, entries_sha256=hashes[entry_kind(layer)])
            for layer in shared.layers
        ),
        peft_config=MappingProxyType({k: values.get(k, v) for k, v in shared.peft_config.items()}),
    )
    return Bundle(
        spec,
        MappingProxyType({layer.name: spectra[layer.name] for layer in spec.layers}),
        MappingProxyType({name: saved[name] for name in template.bundle.saved}),
        template.bundle.explicit_entries,
    )


def _is_shared(tensor: str) -> bool:
    """Whether a tensor of a bundle's file is stored once for many adapters."""
    return tensor.startswith((f"{RESERVED}fingerprint.", f"{RESERVED}entries."))
