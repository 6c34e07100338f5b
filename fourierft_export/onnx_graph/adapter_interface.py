"""The adapter inputs of a graph: which there are, and their names.

Layers of one shape and n_frequency form a group with three inputs, as in the bundle: `spectrum`
[L, n] raw, `entries` [n, 2], `scaling` [L]. Saved heads and biases are inputs under their own
names. Every adapter has its own n: one whose layers differ in n or in entries where the graph has
one group is fed with zeros in between. A bank has the number of adapters in front.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.spec import Fingerprint

KEY = "fourierft_export"  # of the entry in a model's metadata
PREFIX = "fourierft."
ADAPTER_ID = "adapter_id"
BASE_PREFIX = f"{PREFIX}base."
_DTYPES = {"float32", "float64", "float16", "bfloat16"}
_MAX_ELEMENTS = 1 << 33


@dataclass(frozen=True)
class Group:
    """Layers that share their inputs.

    Attributes:
        index: its number among the groups.
        shape: (out_features, in_features).
        layers: module paths; row i of spectrum and scaling is that of the i-th.
        dtype: "float32", or "float64" if spectra that need it were exported.
    """

    index: int
    shape: tuple[int, int]
    layers: tuple[str, ...]
    dtype: str = "float32"

    @property
    def spectrum(self) -> str:
        """Name of the input [L, n]."""
        return f"{PREFIX}spectrum.{self.index}"

    @property
    def entries(self) -> str:
        """Name of the input [n, 2], int64."""
        return f"{PREFIX}entries.{self.index}"

    @property
    def scaling(self) -> str:
        """Name of the input [L], float32."""
        return f"{PREFIX}scaling.{self.index}"


@dataclass(frozen=True)
class Saved:
    """A dense tensor (head, bias) that is part of adapters.

    Attributes:
        name: of the input, and in the adapted model.
        shape: of the tensor.
        dtype: numpy's name of the graph's dtype.
        absent: the base has none (a bare encoder has no head): every adapter must contain one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    absent: bool = False


@dataclass(frozen=True)
class Interface:
    """All adapter inputs of a graph.

    Attributes:
        groups, saved: the inputs.
        fingerprints: layer -> that of the base weight in the graph; an adapter trained on another
            one is refused.
        partial: the graph is a part of the adapted model, such as its encoder: what else an
            adapter changes is left out.
    """

    groups: tuple[Group, ...]
    saved: tuple[Saved, ...] = ()
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)
    partial: bool = False

    @property
    def layers(self) -> dict[str, Group]:
        """Layer -> its group."""
        return {layer: group for group in self.groups for layer in group.layers}

    def not_brought(self, names: Container[str]) -> list[str]:
        """The saved tensors that the base lacks, and that are not among `names` either."""
        return [saved.name for saved in self.saved if saved.absent and saved.name not in names]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for a graph's metadata."""
        kinds = ("spectrum", "entries", "scaling", "shape", "layers", "dtype")
        return {
            "groups": [{kind: getattr(group, kind) for kind in kinds} for group in self.groups],
            "saved": [
                {key: value for key, value in asdict(one).items() if key != "absent" or value}
                for one in self.saved
            ],
            "fingerprints": {
                layer: {
                    "dtype": f.dtype,
                    "digest": f.digest.hex(),
                    "samples": base64.b64encode(f.samples).decode("ascii"),
                }
                for layer, f in self.fingerprints.items()
            },
            **({"partial": True} if self.partial else {}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Interface:
        """The inverse of `to_dict`; KeyError, TypeError or ValueError where it is not one."""
        dtypes = [one["dtype"] for key in ("groups", "saved") for one in content[key]]
        shapes = [one["shape"] for key in ("groups", "saved") for one in content[key]]
        if not {*dtypes} <= _DTYPES:
            raise ValueError(f"dtypes {dtypes}")
        if not all(type(n) is int and n >= 0 for s in shapes for n in s) or any(
            math.prod(shape) > _MAX_ELEMENTS for shape in shapes
        ):
            raise ValueError(f"shapes {shapes}")
        return cls(
            tuple(
                Group(i, (g["shape"][0], g["shape"][1]), tuple(map(str, g["layers"])), g["dtype"])
                for i, g in enumerate(content["groups"])
            ),
            tuple(
                Saved(str(s["name"]), tuple(s["shape"]), s["dtype"], s.get("absent") is True)
                for s in content["saved"]
            ),
            {
                layer: Fingerprint(
                    f["dtype"], bytes.fromhex(f["digest"]), base64.b64decode(f["samples"])
                )
                for layer, f in content["fingerprints"].items()
            },
            content.get("partial") is True,
        )


def group_layers(bundles: Sequence[Bundle]) -> tuple[Group, ...]:
    """The groups for these adapters: the first one's, then layers that only later ones adapt."""
    members: dict[tuple[object, ...], list[str]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for bundle in bundles:
        for layer in bundle.layers:
            if layer.shape is not None and layer.name not in shapes:
                key = layer.shape, layer.n_frequency, layer.entries_sha256
                members.setdefault(key, []).append(layer.name)
                shapes[layer.name] = layer.shape
    spectra = [(name, array) for bundle in bundles for name, array in bundle.spectra.items()]
    wide = {name for name, array in spectra if array.dtype == np.float64}
    return tuple(
        Group(i, shapes[names[0]], tuple(names), "float64" if wide & {*names} else "float32")
        for i, names in enumerate(members.values())
    )
