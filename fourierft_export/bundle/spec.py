"""The spec of an adapter: everything but its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from ..files import dtypes
from ..files.dtypes import FLOAT_DTYPES
from ..spectral.entries import ENTRY_RULES
from ..types import Array
from .layer_templates import MAX_NAMES, name_problem

EXPLICIT_RULE = "explicit"
RESERVED = "fourierft."
"""Prefix of the bundle's own tensors; saved tensors may not have it."""
MAX_WEIGHT_ELEMENTS = 2**33


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the base weight that a layer was trained on (FORMAT.md, section Fingerprint).

    Attributes:
        dtype: safetensors dtype of the base weight ("F32", "BF16", ...).
        digest: first 16 bytes of the sha256 of the weight's little-endian bytes, as stored.
        samples: eight of its values as bfloat16 bit patterns (16 bytes, little-endian uint16).
    """

    dtype: str
    digest: bytes
    samples: bytes


@dataclass(frozen=True)
class LayerSpec:
    """One adapted linear layer.

    Attributes:
        name: module path in the model the adapter was trained on,
            e.g. "bert.encoder.layer.0.attention.self.query".
        n_frequency: number of spectral coefficients.
        shape: (out_features, in_features), the shape of delta_W; None while unbound.
        fan_in_fan_out: the base stores this weight as (in_features, out_features), as GPT-2's
            Conv1D does; delta_W is transposed when it is added. False while unbound.
        entry_rule: "small", "r64" or "explicit"; None while unbound.
        entries_sha256: hash of the entries (`spectral.entries.entries_sha256`); None while unbound.
        fingerprint: of the base weight; None while unbound.
    """

    name: str
    n_frequency: int
    shape: tuple[int, int] | None = None
    fan_in_fan_out: bool = False
    entry_rule: str | None = None
    entries_sha256: str | None = None
    fingerprint: Fingerprint | None = None

    @property
    def is_bound(self) -> bool:
        """Whether the layer knows its shape and entries."""
        return self.shape is not None


@dataclass(frozen=True)
class AdapterSpec:
    """A whole adapter.

    Attributes:
        seed: random_loc_seed as the adapter's author wrote it; entries use it modulo 2^32.
        scaling: multiplies every delta_W; kept as int or float as written.
        layers: in natural order of their names (`bundle.layer_templates.natural_key`).
        task_type: PEFT's task type ("SEQ_CLS", "CAUSAL_LM", ...) or None.
        base_model: base_model_name_or_path as written, or None.
        peft_config: the adapter_config.json it came from, every field as written; empty for an
            adapter that did not come from PEFT.
    """

    seed: int
    scaling: int | float
    layers: tuple[LayerSpec, ...]
    task_type: str | None = None
    base_model: str | None = None
    peft_config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_bound(self) -> bool:
        """Whether every layer is bound to a base."""
        return all(layer.shape is not None for layer in self.layers)

    @property
    def entry_seed(self) -> int:
        """The seed torch's generator really uses: `seed` modulo 2^32."""
        return int(self.seed) % 2**32


def number_offenders(seed: object, scaling: object) -> Iterable[str]:
    """Lists what is wrong with a seed and a scaling."""
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        yield f"random_loc_seed {str(seed)[:40]}: not a whole number of 64 bits"
    if not isinstance(scaling, int | float) or type(scaling) is bool or not abs(scaling) < 2**127:
        yield f"scaling {str(scaling)[:40]}: not a finite float32 number"


def spec_offenders(
    spec: AdapterSpec,
    spectra: Mapping[str, Array],
    saved: Mapping[str, Array],
    explicit_entries: Mapping[str, Array],
) -> Iterable[str]:
    """Lists what is wrong with the fields of a bundle, a line for each problem."""
    yield from number_offenders(spec.seed, spec.scaling)
    if not spec.layers:
        yield "no layers"
    seen: set[str] = set()
    for layer in spec.layers:
        if layer.name in seen:
            yield f"layer {layer.name}: its name appears twice"
        seen.add(layer.name)
        if problem := name_problem(layer.name):
            yield f"layer {layer.name[:80]!r}: its name is not allowed: {problem}"
    if len(spec.layers) > MAX_NAMES:
        yield f"{len(spec.layers)} layers, more than the {MAX_NAMES} that a bundle may have"
    for layer in spec.layers:
        yield from _layer_offenders(layer, spectra.get(layer.name), explicit_entries)
    for name, tensor in saved.items():
        if name.startswith(RESERVED) or name == "__metadata__":
            yield f"tensor {name!r}: names that begin with {RESERVED!r} are reserved"
        if not dtypes.has_name(tensor.dtype):
            yield f"tensor {name!r}: dtype {tensor.dtype}, which safetensors lacks"


def _layer_offenders(
    layer: LayerSpec, spectrum: Array | None, explicit: Mapping[str, Array]
) -> Iterable[str]:
    """Lists what is wrong with one layer, its spectrum (n,) and its explicit entries (n, 2)."""
    name, n = layer.name, layer.n_frequency
    if spectrum is None or spectrum.shape != (n,) or n < 1:
        found = "none" if spectrum is None else f"shape {list(spectrum.shape)}"
        yield f"layer {name}: spectrum of n_frequency {n} >= 1 expected, found {found}"
        return
    if not dtypes.has_name(spectrum.dtype) or dtypes.to_name(spectrum.dtype) not in FLOAT_DTYPES:
        yield f"layer {name}: spectrum of dtype {spectrum.dtype}, which is no float of safetensors"
    elif not _all_finite(spectrum):
        yield f"layer {name}: NaN or infinity in the spectrum"
    facts = (layer.shape, layer.entry_rule, layer.entries_sha256)
    if None in facts and facts != (None, None, None):
        yield f"layer {name}: shape, entry_rule and entries_sha256 must be given together"
    elif layer.entry_rule not in (None, *ENTRY_RULES, EXPLICIT_RULE):
        yield f"layer {name}: unknown entry rule {layer.entry_rule!r}"
    if layer.shape is None:
        return
    size = prod(layer.shape)
    if min(layer.shape) < 1 or size > MAX_WEIGHT_ELEMENTS:
        yield f"layer {name}: shape {list(layer.shape)} outside 1 to 2^33 elements"
    elif n > size:
        yield f"layer {name}: n_frequency {n} above the {size} elements of {list(layer.shape)}"
    elif layer.entry_rule == EXPLICIT_RULE:
        entries = explicit.get(name)
        if entries is None or entries.shape != (n, 2) or entries.dtype.kind not in "iu":
            yield f"layer {name}: explicit entries of shape [{n}, 2] expected"
        elif (entries < 0).any() or (entries >= np.minimum(layer.shape, 2**32)).any():  # as U32
            yield f"layer {name}: entries outside {list(layer.shape)}"
        elif len(np.unique(entries, axis=0)) != n:
            yield f"layer {name}: an entry appears twice"


def _all_finite(spectrum: Array) -> bool:
    with np.errstate(invalid="ignore"):  # casting a signalling NaN is "invalid"
        return bool(np.isfinite(spectrum.astype(np.float64)).all())
