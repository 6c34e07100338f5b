"""What bundles change in a base, tensor by tensor, before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..bundle.file import Bundle
from ..errors import BaseMismatchError, UsageError
from ..models.base import Base, BaseLayer
from ..models.names import Bridge
from ..models.task import head_labels
from ..spectral.delta import Term
from ..types import Array

_OLD_NORM_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


class Ingredient(NamedTuple):
    """One bundle on its way into a base.

    Attributes:
        name: how to speak of it.
        bundle: bound to the base.
        weight: the factor on its delta_W.
        layers: the base's layers, by the bundle's layer names.
        bridge: from the bundle's names to the base's.
    """

    name: str
    bundle: Bundle
    weight: float
    layers: Mapping[str, BaseLayer]
    bridge: Bridge


class Part(NamedTuple):
    """One bundle's share in one layer's change."""

    ingredient: Ingredient
    layer: str

    def term(self) -> Term:
        """The spectrum, its entries (derived here, and cached) and the scaling."""
        bundle = self.ingredient.bundle
        scaling = float(bundle.spec.scaling) * self.ingredient.weight
        return Term(bundle.spectra[self.layer], bundle.entries(self.layer), scaling)


@dataclass(frozen=True)
class LayerChange:
    """A weight that gets delta_W added.

    Attributes:
        name: module path, as the first bundle names it.
        source: the base's tensor; another than the output's for a tied output embedding.
        transposed: it is stored as (in_features, out_features).
        parts: the bundles' shares.
    """

    name: str
    source: str
    transposed: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Changes:
    """All that bundles change. Names are the base's; those the base lacks are the adapter's.

    Attributes:
        layers: weights that get delta_W, by name.
        dense: tensors that replace one of the base, or are added, by name.
        aliases: further tensors: name -> the base's tensor it is a copy of.
        prefix: what every tensor of the base is renamed with, because the head that is added
            makes a bare encoder a task model ("bert"); "" for none.
        outside: names that do not get the prefix: those of the head.
        unties: the output embedding gets a tensor of its own.
    """

    layers: Mapping[str, LayerChange]
    dense: Mapping[str, Array]
    aliases: Mapping[str, str]
    prefix: str
    outside: frozenset[str]
    unties: bool


def collect(base: Base, ingredients: Sequence[Ingredient]) -> Changes:
    """What `ingredients` change in `base`.

    Raises:
        BaseMismatchError: listing every dense tensor of another shape than the base's.
        UsageError: listing every tensor that two bundles set to different values.
    """
    layers: dict[str, LayerChange] = {}
    dense: dict[str, Array] = {}
    outside: set[str] = set()
    prefixes: set[str] = set()
    conflicts: list[str] = []
    misfits: list[str] = []
    for ingredient in ingredients:
        bridge = ingredient.bridge
        for module, layer in ingredient.layers.items():
            key = layer.own_tensor if layer.tied else layer.tensor
            before = layers[key].parts if key in layers else ()
            part = Part(ingredient, module)
            name = layers[key].name if key in layers else module
            layers[key] = LayerChange(name, layer.tensor, layer.transposed, (*before, part))
            if key not in base.tensors:
                outside.add(key)
                prefixes.add(bridge.strip)
        saved = ingredient.bundle.saved
        rows = head_labels({name: value.shape for name, value in saved.items()})
        for name, value in saved.items():
            key = _stored_name(base, bridge.to_base(name))
            if key not in base.tensors and key == name:
                outside.add(key)
                prefixes.add(bridge.strip)
            if key in dense and not _same(dense[key], value):
                conflicts.append(f"{key}: set by {ingredient.name} and by another bundle")
            if key in base.tensors and not _fits(base.tensors[key].shape, value.shape, rows):
                found = list(base.tensors[key].shape)
                misfits.append(f"{name}: shape {list(value.shape)}, in the base {found}")
            dense[key] = value
    conflicts += [f"{key}: both replaced and adapted" for key in dense.keys() & layers.keys()]
    if len(prefixes - {""}) > 1:
        conflicts.append(f"heads for different models: {', '.join(sorted(prefixes))}")
    _refuse(base, conflicts, misfits)
    aliases = _kept_output_embedding(base, dense, layers)
    unties = bool(aliases) or any(_is_output(key) for key in (*layers, *dense))
    return Changes(
        layers, dense, aliases, max(prefixes, default=""), frozenset(outside | set(aliases)), unties
    )


def _refuse(base: Base, conflicts: Iterable[str], misfits: Iterable[str]) -> None:
    if conflicts:
        raise UsageError(
            "bundles",
            expected="bundles that can be merged together",
            found="heads, biases or weights that more than one sets",
            remedy="merge them one at a time into outputs of their own",
            offenders=sorted(conflicts),
        )
    if misfits:
        raise BaseMismatchError(
            base.directory,
            expected="dense tensors of the base's shapes",
            found="others",
            remedy="give the base model that the adapter belongs to",
            offenders=misfits,
        )


def _stored_name(base: Base, key: str) -> str:
    """`key`, or what checkpoints of BERT's time call it: transformers renames it while loading."""
    for now, then in _OLD_NORM_NAMES.items():
        old = key.removesuffix(now) + then
        if key.endswith(now) and key not in base.tensors and old in base.tensors:
            return old
    return key


def _fits(there: tuple[int, ...], new: tuple[int, ...], rows: int | None) -> bool:
    """Whether a tensor may replace another: the same shape, or a head with other labels."""
    return there == new or (new[:1] == (rows,) and there[1:] == new[1:])


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _is_output(key: str) -> bool:
    """Whether a tensor is the weight of a causal model's output embedding."""
    return f".{key}".endswith(".lm_head.weight")


def _output_embedding(base: Base) -> BaseLayer | None:
    try:
        return base.layer("lm_head")
    except BaseMismatchError:
        return None


def _kept_output_embedding(
    base: Base, dense: Mapping[str, Array], layers: Mapping[str, LayerChange]
) -> dict[str, str]:
    """A tied output embedding stays as it is when the input embedding is replaced (as in PEFT)."""
    head = _output_embedding(base)
    if head is None or not head.tied or head.tensor not in dense or head.own_tensor == head.tensor:
        return {}
    if head.own_tensor in dense or head.own_tensor in layers:
        return {}
    architectures = base.config.get("architectures") or [""]
    causal = str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
    return {head.own_tensor: head.tensor} if causal else {}
