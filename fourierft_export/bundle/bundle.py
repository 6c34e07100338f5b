"""The bundle: one adapter, immutable, in memory and as a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..errors import BadInputError
from ..files.hub import local_adapter
from ..files.safetensors_reader import read_file, read_header
from ..files.staging import staged_file
from ..models.base_tensors import Base, open_base
from ..spectral.entries import entries_sha256, spectral_entries
from ..types import Array, html_table
from .file_format import HASH_KEY, check_kind, decode, encode, split_file
from .fit import check_fits, fit_adapter, layers_of_base
from .layer_templates import natural_key
from .spec import EXPLICIT_RULE, AdapterSpec, LayerSpec, spec_offenders

SUFFIX = ".fourierft.safetensors"


@dataclass(frozen=True, eq=False)
class Bundle:
    """A FourierFT adapter: its spec, a spectrum for each layer, and its saved heads and biases.

    Make one with `Bundle.load`, `Bundle.build`, `from_peft` or `capture`: they check the fields,
    the constructor does not. A bundle never changes; its arrays are read-only.

    Args:
        spec: names and sizes of the layers, seed, scaling, PEFT's config.
        spectra: layer name -> coefficients (n_frequency,), float32, float16, bfloat16 or float64.
        saved: name in the adapted model -> dense tensor (modules_to_save, biases).
        explicit_entries: layer name -> entries (n_frequency, 2) int64, for layers whose entries
            no seed gives (rule "explicit").

    Example:
        >>> import fourierft_export as ff, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> bundle = ff.capture(ff.inject(model, config))
        >>> bundle.layers[0].name, bundle.layers[0].shape, bundle.spectra["0"].shape
        ('0', (4, 8), (5,))
        >>> path = bundle.save(tempfile.mkdtemp() + "/a.fourierft.safetensors")
        >>> ff.Bundle.load(path).sha256 == bundle.sha256
        True
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
        """Makes a bundle after checking its fields; layers are sorted and arrays are copied.

        Args:
            spec: everything but the numbers.
            spectra: layer name -> (n_frequency,) of any float dtype.
            saved: tensor name -> array, for heads and biases.
            explicit_entries: layer name -> (n_frequency, 2), where no seed gives them.
            where: what errors name as the place.

        Returns:
            The bundle, with its layers in natural order.

        Raises:
            BadInputError: fields that do not fit together, all of them listed.
        """
        saved, explicit = saved or {}, explicit_entries or {}
        layers = tuple(sorted(spec.layers, key=lambda layer: natural_key(layer.name)))
        spec = replace(spec, layers=layers)
        offenders = list(spec_offenders(spec, spectra, saved, explicit))
        if offenders:
            more = len(offenders) - 1
            raise BadInputError(
                where,
                expected="an adapter whose fields fit together",
                found=offenders[0] + (f", and {more} more" if more else ""),
                offenders=offenders if more else (),
            )
        return cls(
            replace(spec, peft_config=MappingProxyType(dict(spec.peft_config))),
            _frozen({m.name: spectra[m.name] for m in layers}),
            _frozen(dict(sorted(saved.items()))),
            _frozen({m.name: explicit[m.name] for m in layers if m.entry_rule == EXPLICIT_RULE}),
        )

    def _repr_html_(self) -> str:
        spec = self.spec
        facts = {"seed": spec.seed, "scaling": spec.scaling, "base": spec.base_model}
        rows = ((layer.name, layer.shape, layer.n_frequency) for layer in spec.layers)
        return html_table("FourierFT bundle", facts, [("layer", "shape", "n"), *rows])

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
            BadInputError: the layer is unbound, or its entries do not have the hash in the spec.
        """
        layer = self.layer(name)
        if layer.shape is None:
            raise BadInputError(
                f"layer {name}",
                expected="a bound bundle",
                found="a bundle without layer shapes",
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
                found=f"other entries, from seed {self.spec.seed} by rule {layer.entry_rule}",
                remedy="the program that wrote the bundle has a fault: pack the adapter again",
            )
        return entries

    def bind(self, base: str | os.PathLike[str] | Base, entry_rule: str | None = None) -> Bundle:
        """Adds the shapes, entries and fingerprints of a base's layers to this adapter.

        A bundle that is bound already is compared with the base and stays the same.

        Args:
            base: a checkpoint directory or file, or an open base.
            entry_rule: "small" or "r64", for adapters trained with an older torch; by default
                what the current torch does for each shape.

        Returns:
            A bound bundle.

        Raises:
            BaseMismatchError: layers that are absent, too small, of another shape, or whose
                weight has another fingerprint: all of them listed.
            FileAccessError, BadInputError: the base cannot be opened.
        """
        opened = base if isinstance(base, Base) else open_base(base)
        found = layers_of_base(opened, self.spectra)
        fit = fit_adapter(self.spec, found, entry_rule=entry_rule)
        check_fits(opened.directory, [fit], allow_base_mismatch=None)
        return replace(self, spec=fit.spec)

    def __reduce__(self) -> tuple[Callable[[bytes], Bundle], tuple[bytes]]:
        return Bundle.from_bytes, (self.to_bytes(),)  # read-only views do not pickle

    def to_bytes(self) -> bytes:
        """The bundle as the bytes of its file; equal content gives equal bytes."""
        return encode(self.spec, self.spectra, self.saved, self.explicit_entries)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content as hex: the hash that the bundle's file holds."""
        return split_file(self.to_bytes(), "bundle")[0].metadata[HASH_KEY]

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "bundle") -> Bundle:
        """Reads a bundle from the bytes of its file.

        Args:
            data: what `to_bytes` gave.
            where: what errors name as the place.

        Raises:
            BadInputError: they are not a bundle, or a damaged one.
        """
        return cls.build(*decode(data, where), where=where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bundle:
        """Reads a bundle file.

        Args:
            path: of the file, or a Hub id; `from_peft` reads PEFT directories.

        Raises:
            FileAccessError: missing or unreadable.
            BadInputError: not a bundle, or a damaged one.
        """
        path = local_adapter(path)
        where = os.fspath(path)
        header = read_header(path)  # checked before the payload, which may be large, is read
        check_kind(header, where)
        return cls.from_bytes(read_file(path, header.size), where)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes the bundle to a file, which is complete or absent, whenever the process dies.

        Args:
            path: of the file, *.fourierft.safetensors by custom.
            force: replace an existing file.

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
    """Read-only copies in the machine's byte order, which torch needs."""
    copies = {
        name: np.array(array, array.dtype.newbyteorder("="), copy=True, order="C")
        for name, array in arrays.items()
    }
    for copy in copies.values():
        copy.setflags(write=False)
    return MappingProxyType(copies)
