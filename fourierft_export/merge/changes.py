"""What bundles change in a base, tensor by tensor, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..bundle.file import Bundle
from ..bundle.fit import Fit, FoundTensor, fit_adapter, layers_of_base
from ..errors import UsageError
from ..files.container import TensorInfo
from ..files.dtypes import FLOAT_DTYPES, to_name
from ..files.write import Slot
from ..models.base import Base, BaseLayer, is_input_embedding
from ..models.task import head_weight
from ..spectral.delta import Term
from ..types import Array


@dataclass(frozen=True)
class Share:
    """What one bundle adds to one weight; small to pickle, since it holds that layer alone.

    Attributes:
        number: of the bundle, among those that are merged.
        layer: module path, as the bundle names it.
        bundle: the bound bundle without its other layers and its dense tensors.
        weight: the factor on delta_W.
    """

    number: int
    layer: str
    bundle: Bundle
    weight: float

    def term(self) -> Term:
        """Return the spectrum, its entries (computed here, and cached) and the scaling."""
        scaling = float(self.bundle.spec.scaling) * self.weight
        return Term(self.bundle.spectra[self.layer], self.bundle.entries(self.layer), scaling)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        slot: name, dtype and shape in the output.
        source: the base's tensor that it is made of; None for a dense tensor of a bundle.
        value: a dense tensor of a bundle, in place of `source`.
        shares: the delta_W that are added to `source`.
        layer: module path of the weight that they are added to, as the first bundle names it.
        transposed: this weight is stored as (in_features, out_features).
    """

    slot: Slot
    source: TensorInfo | None = None
    value: Array | None = None
    shares: tuple[Share, ...] = ()
    layer: str = ""
    transposed: bool = False

    @property
    def is_copied(self) -> bool:
        """Whether it is the base's tensor under the same name, byte for byte."""
        source = self.source
        return (
            source is not None
            and not self.shares
            and self.slot == (source.name, source.dtype, source.shape)
        )


@dataclass
class Changes:
    """All that bundles change in a base.

    Attributes:
        tensors: what becomes of a tensor, by its name in the base; by the adapter's name where the
            base has no such tensor.
        prefix: what every tensor of the base is renamed with, because the head that is added
            makes a bare encoder a task model ("bert"); "" for none.
        outside: names that do not get the prefix: those of the head.
        unties: the output embedding, tied in the base, becomes a separate tensor.
    """

    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    prefix: str = ""
    outside: set[str] = field(default_factory=set)
    unties: bool = False

    def out_name(self, key: str) -> str:
        """Return a tensor's name in the output, from its name in the base."""
        return f"{self.prefix}.{key}" if self.prefix and key not in self.outside else key


def fit_bundle(base: Base, name: str, bundle: Bundle, *, thorough: bool) -> Fit:
    """Compare a bundle's layers and dense tensors with those of a base.

    Args:
        base: the base.
        name: of the bundle, for messages.
        bundle: bound or not.
        thorough: read and hash the weights; otherwise eight values of each are compared.
    """
    modules = [layer.name for layer in bundle.layers]
    bridge = base.bridge(modules)
    weight = head_weight({key: value.shape for key, value in bundle.saved.items()})
    labels = None if weight is None else bundle.saved[weight].shape[0]
    head = None if weight is None else weight.rpartition(".")[0]
    places = {key: base.tensors.get(base.stored_name(bridge.to_base(key))) for key in bundle.saved}
    tensors = {
        key: FoundTensor(
            info.shape,
            info.dtype not in FLOAT_DTYPES,
            labels if key.rpartition(".")[0] == head else None,
        )
        for key, info in places.items()
        if info is not None
    }
    layers = layers_of_base(base, modules, thorough=thorough)
    return fit_adapter(bundle.spec, layers, bundle.saved, tensors, name=name)


def collect_changes(
    base: Base, bundles: Sequence[Bundle], names: Sequence[str], weights: Sequence[float]
) -> Changes:
    """Collect what bound bundles, which fit `base`, change in it.

    Raises:
        UsageError: listing every tensor that two bundles set to different values.
    """
    changes = Changes()
    prefixes: set[str] = set()
    conflicts: list[str] = []
    for number, bundle in enumerate(bundles):
        modules = [layer.name for layer in bundle.layers]
        bridge = base.bridge(modules)
        for module, layer in base.layers(modules).items():
            key = layer.own_tensor if layer.tied else layer.tensor
            source = base.tensors[layer.tensor]
            plan = changes.tensors.get(key) or TensorPlan(
                Slot(key, source.dtype, source.shape),
                source,
                layer=module,
                transposed=layer.transposed,
            )
            share = Share(number, module, _only_layer(bundle, module), weights[number])
            changes.tensors[key] = replace(plan, shares=(*plan.shares, share))
            if key not in base.tensors:
                changes.outside.add(key)
                prefixes.add(bridge.strip)
    for bundle, name in zip(bundles, names, strict=True):
        bridge = base.bridge([layer.name for layer in bundle.layers])
        for tensor, value in bundle.saved.items():
            key = base.stored_name(bridge.to_base(tensor))
            if key not in base.tensors and key == tensor:
                changes.outside.add(key)
                prefixes.add(bridge.strip)
            there = changes.tensors.get(key)
            if there is not None and there.shares:
                conflicts.append(f"{key}: both replaced and adapted")
            elif there is not None and not _is_same(there.value, value):
                conflicts.append(f"{key}: set by {name} and by another bundle")
            else:
                slot = Slot(key, to_name(value.dtype), value.shape)
                changes.tensors[key] = TensorPlan(slot, value=value)
    if len(prefixes - {""}) > 1:
        conflicts.append(f"heads for different models: {', '.join(sorted(prefixes))}")
    if conflicts:
        raise UsageError(
            "bundles",
            expected="bundles that can be merged together",
            found="heads, biases or weights that more than one sets",
            remedy="merge each of them into a separate output",
            offenders=sorted(set(conflicts)),
        )
    changes.prefix = max(prefixes, default="")
    _separate_embeddings(base, changes)
    return changes


def _only_layer(bundle: Bundle, name: str) -> Bundle:
    spec = replace(bundle.spec, layers=(bundle.layer(name),), peft_config={})
    return Bundle.build(spec, bundle.spectra, {}, bundle.explicit_entries)


def _is_same(a: Array | None, b: Array) -> bool:
    return (
        a is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    )


def _separate_embeddings(base: Base, changes: Changes) -> None:
    """Store both sides of a tie of which one changes, as in PEFT's unmerged model."""
    head = base.find(["lm_head"])["lm_head"]
    if not isinstance(head, BaseLayer):
        changes.unties = any(f".{key}".endswith(".lm_head.weight") for key in changes.tensors)
        return
    output, embedding = head.own_tensor, base.input_embedding
    changed = [key for key in changes.tensors if is_input_embedding(key)]
    if output in changes.tensors:
        changes.unties = True
        if head.tied and embedding is None and not changed:
            _add_copy(base, changes, head.tensor, base.name_of_input_embedding())
    elif head.tied and any(changes.tensors[key].value is not None for key in changed):
        architectures = base.config.get("architectures") or [""]
        has_head = str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
        changes.unties = has_head or output in base.tensors
        if has_head and output not in base.tensors:
            _add_copy(base, changes, head.tensor, output)


def _add_copy(base: Base, changes: Changes, stored: str, name: str) -> None:
    """Add a copy of one of the base's tensors under a name that it does not have."""
    source = base.tensors[stored]
    changes.tensors[name] = TensorPlan(Slot(name, source.dtype, source.shape), source)
    changes.outside.add(name)
