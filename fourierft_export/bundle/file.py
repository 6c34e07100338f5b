"""The bundle: one adapter, immutable, in memory and as a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ..checkpoint import dtypes
from ..checkpoint.container import (
    FLOAT_DTYPES,
    header_length,
    open_regular,
    parse_header,
    read_exactly,
)
from ..checkpoint.staging import staged_file
from ..errors import BadInputError, BaseMismatchError
from ..spectral.entries import ENTRY_RULES, current_rule, entries_sha256, spectral_entries
from . import codec, fingerprint
from .names import MAX_NAMES, natural_key, why_not
from .spec import EXPLICIT_RULE, AdapterSpec, LayerSpec

SUFFIX = ".fourierft.safetensors"
MAX_WEIGHT_ELEMENTS = 2**33

Array = np.ndarray[Any, np.dtype[Any]]


class BoundLayer(Protocol):
    """What a base says of one linear layer (`models.base.BaseLayer` is one)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in_features, out_features)."""


class BaseLike(Protocol):
    """What `Bundle.bind` needs of a base (`models.base.Base` is one)."""

    def layers(self, modules: Iterable[str]) -> Mapping[str, Any]:
        """A `BoundLayer` per module path; raises BaseMismatchError naming all that are absent."""

    def weight(self, module: str) -> Array:
        """The layer's weight as stored."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A FourierFT adapter: spec, one spectrum per layer, dense tensors that ride along.

    Make one with `Bundle.build`, `Bundle.load`, `from_peft` or `capture`; the constructor does not
    check. Arrays are read-only.

    Attributes:
        spec: names, sizes, seed, scaling.
        spectra: layer name -> (n_frequency,), float32, float16, bfloat16 or float64.
        saved: name in the adapted model -> dense tensor (modules_to_save, biases).
        explicit_entries: layer name -> (n_frequency, 2) int64, for layers of the explicit rule.
    """

    spec: AdapterSpec
    spectra: Mapping[str, Array]
    saved: Mapping[str, Array] = field(default_factory=dict)
    explicit_entries: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        spec: AdapterSpec,
        spectra: Mapping[str, Array],
        saved: Mapping[str, Array] | None = None,
        explicit_entries: Mapping[str, Array] | None = None,
        *,
        where: str = "bundle",
    ) -> Bundle:
        """A checked bundle; layers are put in natural order, arrays are copied.

        Args:
            where: what to name in errors.

        Raises:
            BadInputError: listing every field that does not fit.
        """
        saved, explicit = saved or {}, explicit_entries or {}
        layers = tuple(sorted(spec.layers, key=lambda m: natural_key(m.name)))
        offenders = [
            *_spec_offenders(spec),
            *(o for m in layers for o in _layer_offenders(m, spectra.get(m.name), explicit)),
            *(
                f"tensor {n!r}: names that begin with {codec.RESERVED!r} are reserved"
                for n in saved
                if n.startswith(codec.RESERVED) or n == "__metadata__"
            ),
            *(
                f"tensor {n!r}: dtype {t.dtype}, which safetensors lacks"
                for n, t in saved.items()
                if not dtypes.has_name(t.dtype)
            ),
        ]
        if offenders:
            more = len(offenders) - 1
            raise BadInputError(
                where,
                expected="an adapter whose fields fit together",
                found=offenders[0] + (f", and {more} more" if more else ""),
                offenders=offenders if more else (),
            )
        return cls(
            replace(spec, layers=layers, peft_config=MappingProxyType(dict(spec.peft_config))),
            _frozen({m.name: spectra[m.name] for m in layers}),
            _frozen(dict(sorted(saved.items()))),
            _frozen({m.name: explicit[m.name] for m in layers if m.entry_rule == EXPLICIT_RULE}),
        )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers' specs, in natural order."""
        return self.spec.layers

    @property
    def is_bound(self) -> bool:
        """Whether every layer's shape and entries are known."""
        return self.spec.is_bound

    @cached_property
    def _layer_of(self) -> dict[str, LayerSpec]:
        return {layer.name: layer for layer in self.spec.layers}

    def layer(self, name: str) -> LayerSpec:
        """The spec of one layer.

        Raises:
            KeyError: no such layer.
        """
        return self._layer_of[name]

    def entries(self, name: str) -> Array:
        """The spectral entries of a bound layer: (n_frequency, 2) int64, read-only.

        Raises:
            KeyError: no such layer.
            BadInputError: the layer is unbound, or its entries do not have the stated hash.
        """
        layer = self._layer_of[name]
        if layer.shape is None:
            raise BadInputError(
                f"layer {name}",
                expected="a bound bundle",
                found="one without layer shapes",
                remedy="bind it first: bundle.bind(BASE_DIR), or pack with --base BASE_DIR",
            )
        if layer.entry_rule == EXPLICIT_RULE:
            entries = self.explicit_entries[name]
        else:
            entries = spectral_entries(
                self.spec.entry_seed, layer.shape, layer.n_frequency, layer.entry_rule
            )
        if entries_sha256(entries) != layer.entries_sha256:
            raise BadInputError(
                f"layer {name}",
                expected=f"entries with sha256 {layer.entries_sha256}",
                found=f"others, from seed {self.spec.seed} by rule {layer.entry_rule}",
                remedy="the bundle was made by a faulty writer: pack the adapter again",
            )
        return entries

    def bind(
        self, base: str | os.PathLike[str] | BaseLike, entry_rule: str | None = None
    ) -> Bundle:
        """This adapter with shapes, entries and fingerprints taken from a base.

        A bundle that is bound already is checked against the base and returned as it is.

        Args:
            base: a checkpoint directory or file, or an open base.
            entry_rule: "small" or "r64", for adapters trained with an older torch; by default
                what the current torch does for each shape.

        Raises:
            BaseMismatchError: layers that are absent, too small, of another shape, or whose
                weight is not the fingerprinted one: all of them listed.
        """
        if isinstance(base, (str, os.PathLike)):
            from ..models.base import open_base

            base = open_base(base)
        found = base.layers([layer.name for layer in self.layers])
        offenders: list[str] = []
        bound: list[LayerSpec] = []
        for layer in self.layers:
            there: BoundLayer = found[layer.name]
            problem = _mismatch(layer, there)
            if problem is None and layer.fingerprint is not None:
                verdict = fingerprint.compare(layer.fingerprint, base.weight(layer.name))
                problem = "another weight than the adapter was trained on"
                problem = problem if verdict == "different" else None
            if problem:
                offenders.append(f"{layer.name}: {problem}")
            elif layer.is_bound and layer.fingerprint:
                bound.append(layer)
            else:
                bound.append(self._bound_layer(layer, there, base.weight(layer.name), entry_rule))
        if offenders:
            raise BaseMismatchError(
                getattr(base, "directory", "base"),
                expected="the base that the adapter was trained on",
                found=f"{len(offenders)} of {len(self.layers)} layers that do not fit",
                remedy="give the base model that the adapter belongs to",
                offenders=offenders,
            )
        return replace(self, spec=replace(self.spec, layers=tuple(bound)))

    def _bound_layer(
        self, layer: LayerSpec, there: BoundLayer, weight: Array, entry_rule: str | None
    ) -> LayerSpec:
        shape = there.shape
        rule = layer.entry_rule or entry_rule or current_rule(shape)
        digest = layer.entries_sha256 or entries_sha256(
            spectral_entries(self.spec.entry_seed, shape, layer.n_frequency, rule)
        )
        return replace(
            layer,
            shape=shape,
            fan_in_fan_out=there.fan_in_fan_out,
            entry_rule=rule,
            entries_sha256=digest,
            fingerprint=fingerprint.fingerprint(weight),
        )

    def to_bytes(self) -> bytes:
        """The bundle as the bytes of its file; equal content gives equal bytes."""
        return codec.encode(
            codec.Content(self.spec, self.spectra, self.saved, self.explicit_entries)
        )

    @cached_property
    def sha256(self) -> str:
        """The hash of the content that the file states, as hex."""
        data = self.to_bytes()
        length = int.from_bytes(data[:8], "little")
        return parse_header(data[8 : 8 + length], len(data), "bundle").metadata[codec.HASH_KEY]

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "bundle") -> Bundle:
        """The bundle in these bytes.

        Raises:
            BadInputError: they are not a bundle, or a damaged one.
        """
        length = header_length(data[:8], len(data), where)
        header = parse_header(data[8 : 8 + length], len(data), where)
        return cls._of(codec.decode(header, data[8 + length :], where), where)

    @classmethod
    def _of(cls, content: codec.Content, where: str) -> Bundle:
        return cls.build(
            content.spec, content.spectra, content.saved, content.explicit_entries, where=where
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle file.

        Raises:
            FileAccessError: missing or unreadable.
            BadInputError: not a bundle, or a damaged one.
        """
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            # The header is checked before the payload, which may be large, is read.
            head = read_exactly(fd, 0, min(8, size), path)
            length = header_length(head, size, os.fspath(path))
            text = read_exactly(fd, 8, 8 + length, path)
            header = parse_header(text, size, os.fspath(path))
            codec.check_kind(header, os.fspath(path))
            payload = read_exactly(fd, 8 + length, size, path)
        finally:
            os.close(fd)
        return cls._of(codec.decode(header, payload, os.fspath(path)), os.fspath(path))

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the bundle; the file is absent or complete.

        Returns:
            The path written.

        Raises:
            UsageError: the file exists, without `force`.
            FileAccessError: it cannot be written.
        """
        with staged_file(path, force=force) as partial:
            partial.write_bytes(self.to_bytes())
        return Path(path)


def _frozen(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    copies = {name: np.array(array, copy=True, order="C") for name, array in arrays.items()}
    for copy in copies.values():
        copy.setflags(write=False)
    return MappingProxyType(copies)


def _spec_offenders(spec: AdapterSpec) -> Iterable[str]:
    if type(spec.seed) is not int or not -(2**63) <= spec.seed < 2**64:
        yield f"seed {str(spec.seed)[:40]}: not a whole number of 64 bits"
    if type(spec.scaling) not in (int, float) or not abs(spec.scaling) < 2**127:
        yield f"scaling {str(spec.scaling)[:40]}: not a finite float32 number"
    elif not isfinite(spec.scaling):
        yield f"scaling {spec.scaling}: not finite"
    if not spec.layers:
        yield "no layers"
    seen: set[str] = set()
    for layer in spec.layers:
        if layer.name in seen:
            yield f"layer {layer.name}: named twice"
        seen.add(layer.name)
        if problem := why_not(layer.name):
            yield f"layer {layer.name[:80]!r}: {problem} in its name"
    if len(spec.layers) > MAX_NAMES:
        yield f"{len(spec.layers)} layers, where {MAX_NAMES} is the most"


def _layer_offenders(
    layer: LayerSpec, spectrum: Array | None, explicit: Mapping[str, Array]
) -> Iterable[str]:
    name, n = layer.name, layer.n_frequency
    if spectrum is None or spectrum.shape != (n,) or n < 1:
        found = "none" if spectrum is None else f"shape {list(spectrum.shape)}"
        yield f"layer {name}: spectrum of n_frequency {n} >= 1 expected, found {found}"
        return
    if not dtypes.has_name(spectrum.dtype) or dtypes.to_name(spectrum.dtype) not in FLOAT_DTYPES:
        yield f"layer {name}: spectrum of dtype {spectrum.dtype}, which is no float"
    elif not _all_finite(spectrum):
        yield f"layer {name}: NaN or infinity in the spectrum"
    facts = (layer.shape, layer.entry_rule, layer.entries_sha256)
    if None in facts and facts != (None, None, None):
        yield f"layer {name}: shape, entry_rule and entries_sha256 go together"
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
        elif (entries < 0).any() or (entries >= np.array(layer.shape)).any():
            yield f"layer {name}: entries outside {list(layer.shape)}"
        elif len(np.unique(entries, axis=0)) != n:
            yield f"layer {name}: an entry twice"


def _all_finite(spectrum: Array) -> bool:
    with np.errstate(invalid="ignore"):  # casting a signalling NaN is "invalid"
        return bool(np.isfinite(spectrum.astype(np.float64)).all())


def _mismatch(layer: LayerSpec, there: BoundLayer) -> str | None:
    """Why a layer cannot belong to what the base has in its place."""
    if layer.shape is not None and layer.shape != there.shape:
        return f"shape {list(layer.shape)} expected, found {list(there.shape)}"
    if layer.shape is not None and layer.fan_in_fan_out != there.fan_in_fan_out:
        return "stored transposed to what the adapter says"
    if layer.n_frequency > prod(there.shape):
        return f"n_frequency {layer.n_frequency} above the size of {list(there.shape)}"
    return None
