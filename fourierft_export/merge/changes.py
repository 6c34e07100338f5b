"""What bundles change in a base: its tensors and its config.json, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.fit import Fit, FoundTensor, fit_adapter, layers_of_base
from ..errors import UsageError
from ..files.dtypes import DTYPE_BITS, FLOAT_DTYPES, to_name
from ..files.safetensors_reader import TensorInfo
from ..models import task as tasks
from ..models.base_tensors import T5_FAMILIES, Base, BaseLayer, is_input_embedding
from ..spectral.delta import Term
from ..types import Array


@dataclass(frozen=True)
class Share:
    """What one bundle adds to one weight; small to pickle, since it holds that layer alone."""

    number: int  # of the bundle, among those that are merged
    layer: str  # module path, as the bundle names it
    bundle: Bundle  # bound, without its other layers and its dense tensors
    weight: float  # the factor on delta_W

    def term(self) -> Term:
        """Return the spectrum, its entries and the scaling."""
        scaling = float(self.bundle.spec.scaling) * self.weight
        return Term(self.bundle.spectra[self.layer], self.bundle.entries(self.layer), scaling)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: its name, safetensors dtype and shape, and how it is made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None = None  # the base's tensor that it is made of
    value: Array | None = None  # a dense tensor of a bundle, in place of `source`
    shares: tuple[Share, ...] = ()  # the delta_W that are added to `source`
    layer: str = ""  # module path of the weight that they are added to
    transposed: bool = False  # this weight is stored as (in_features, out_features)

    @property
    def nbytes(self) -> int:
        """Size of its payload in bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def is_copied(self) -> bool:
        """Whether it is the base's tensor under the same name, byte for byte."""
        source = self.source
        same = source is not None and (source.name, source.dtype) == (self.name, self.dtype)
        return same and not self.shares


@dataclass
class Changes:
    """All that bundles change in a base."""

    # By their names in the base, or in the adapter where the base has none.
    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    # What every tensor of the base is renamed with, because the head that is added makes a bare
    # encoder a task model ("bert"); "" for none.
    prefix: str = ""
    # Names that do not get the prefix: those of the head.
    outside: set[str] = field(default_factory=set)
    unties: bool = False  # the output embedding, tied in the base, becomes a separate tensor

    def out_name(self, key: str) -> str:
        """Return a tensor's name in the output, from its name in the base."""
        return f"{self.prefix}.{key}" if self.prefix and key not in self.outside else key


def fit_bundle(base: Base, name: str, bundle: Bundle, *, thorough: bool) -> Fit:
    """Compare a bundle's layers and dense tensors with a base's: all values, or a few of each."""
    modules = [layer.name for layer in bundle.layers]
    bridge = base.bridge(modules)
    weight = tasks.head_weight({key: value.shape for key, value in bundle.saved.items()})
    tensors = {}
    for key in bundle.saved:
        info = base.tensors.get(base.stored_name(bridge.to_base(key)))
        if info is not None:
            in_head = weight is not None and key.rpartition(".")[0] == weight.rpartition(".")[0]
            labels = bundle.saved[weight].shape[0] if weight is not None and in_head else None
            tensors[key] = FoundTensor(info.shape, info.dtype not in FLOAT_DTYPES, labels)
    layers = layers_of_base(base, modules, thorough=thorough)
    return fit_adapter(bundle.spec, layers, bundle.saved, tensors, name=name)


def collect_changes(
    base: Base, bundles: Sequence[Bundle], names: Sequence[str], weights: Sequence[float]
) -> Changes:
    """Collect what bound bundles change in `base`; UsageError if two disagree on a tensor."""
    changes = Changes()
    prefixes: set[str] = set()
    conflicts: list[str] = []
    bridges = [base.bridge([layer.name for layer in bundle.layers]) for bundle in bundles]
    for number, bundle in enumerate(bundles):
        for module, layer in base.layers(layer.name for layer in bundle.layers).items():
            key = layer.own_tensor if layer.tied else layer.tensor
            source = base.tensors[layer.tensor]
            plan = changes.tensors.get(key) or TensorPlan(
                key, source.dtype, source.shape, source, layer=module, transposed=layer.transposed
            )
            spec = replace(bundle.spec, layers=(bundle.layer(module),), peft_config={})
            alone = Bundle.build(spec, bundle.spectra, {}, bundle.explicit_entries)
            share = Share(number, module, alone, weights[number])
            changes.tensors[key] = replace(plan, shares=(*plan.shares, share))
            if key not in base.tensors:
                changes.outside.add(key)
                prefixes.add(bridges[number].strip)
    for bundle, bridge, name in zip(bundles, bridges, names, strict=True):
        for tensor, value in bundle.saved.items():
            key = base.stored_name(bridge.to_base(tensor))
            if key not in base.tensors and key == tensor:
                changes.outside.add(key)
                prefixes.add(bridge.strip)
            new = TensorPlan(key, to_name(value.dtype), value.shape, value=value)
            plan = changes.tensors.setdefault(key, new)
            if plan.value is None:
                conflicts.append(f"{key}: both replaced and adapted")
            elif (plan.dtype, plan.shape, plan.value.tobytes()) != (
                new.dtype, new.shape, value.tobytes()
            ):  # fmt: skip
                conflicts.append(f"{key}: set by {name} and by another bundle")
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


def _separate_embeddings(base: Base, changes: Changes) -> None:
    """Store both sides of a tie of which one changes, as in PEFT's unmerged model."""
    head = base.find(["lm_head"])["lm_head"]
    if not isinstance(head, BaseLayer):
        changes.unties = any(f".{key}".endswith(".lm_head.weight") for key in changes.tensors)
        return
    copied, output = "", head.own_tensor
    changed = [key for key in changes.tensors if is_input_embedding(key)]
    if output in changes.tensors:
        changes.unties = True
        if head.tied and base.input_embedding is None and not changed:
            copied = base.name_of_input_embedding()
    elif head.tied and any(changes.tensors[key].value is not None for key in changed):
        architectures = base.config.get("architectures") or [""]
        has_head = str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
        changes.unties = has_head or output in base.tensors
        copied = output if has_head and output not in base.tensors else ""
    if copied:
        source = base.tensors[head.tensor]
        changes.tensors[copied] = TensorPlan(copied, source.dtype, source.shape, source)
        changes.outside.add(copied)


def make_config(
    base: Base,
    bundles: Sequence[Bundle],
    weights: Sequence[float],
    changes: Changes,
    dtype: str,
    labels: Sequence[str] | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make the config.json of a merge's output ({} for a base without one), and notes."""
    notes = []
    heads = [bundle for bundle in bundles if bundle.saved]
    if any(w != 1 and bundle.saved for w, bundle in zip(weights, bundles, strict=True)):
        notes.append("weights scale delta_W only: heads and biases are not scaled")
    added = sorted(changes.outside - {*base.tensors})
    brought = [key for key in added if changes.tensors[key].value is not None]
    if not base.config:
        if labels is not None:
            raise UsageError(
                "labels", expected="none: the base has no config.json for them", found=f"{labels}"
            )
        if added or changes.unties:
            notes.append("the base has no config.json: none was made")
        return {}, tuple(notes)
    types = sorted({bundle.spec.task_type or "" for bundle in heads or bundles} - {""})
    task_type = types[0] if len(types) == 1 else None
    shapes = {name: value.shape for b in bundles for name, value in b.saved.items()}
    config = _with_labels(base.config, task_type, shapes, labels)
    if added:
        task = tasks.likely_task(config, task_type)
        # A model without a head needs no new architecture.
        has_head = task is not None and task.name != "feature-extraction"
        name = tasks.architecture_for(config, task) if task and has_head else None
        if name is not None:
            # Other names are probably no tensors of the model, which would load without them.
            is_new = [name] != config.get("architectures")
            known = {"lm_head", "embed_out", *(tasks.HEAD_PARTS if is_new else ())}
            strange = [key for key in brought if not known & {*key.split(".")}]
            if strange:
                notes.append(
                    f"the base has no tensor {', '.join(strange)}: added as the adapter has it; "
                    f"check that {name} uses it"
                )
            config["architectures"] = [name]
        elif brought:
            of = f"task types {', '.join(types)}" if types else "an adapter without a task type"
            of = f"task type {task_type}" if task_type else of
            notes.append(
                f"{', '.join(added)} added, but no architecture is known for {of}: "
                "set architectures in config.json"
            )
    if changes.unties:
        # T5 would read False as "do not scale the decoder's outputs".
        is_t5 = base.model_type in T5_FAMILIES
        if not is_t5:
            config["tie_word_embeddings"] = False
        if is_t5 and added:
            notes.append(
                "the output embedding was tied and is now a separate weight; transformers 4 would "
                "tie it again"
            )
        elif len(brought) < len(added):
            notes.append("the output embedding was tied and is now a separate weight")
    if dtype != "keep":
        # transformers loads a checkpoint in the dtype its config names, by a new and an old key.
        config["dtype"] = dtype
        config.update({"torch_dtype": dtype} if "torch_dtype" in config else {})
    return config, tuple(notes)


def _with_labels(
    config: Mapping[str, Any],
    task_type: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    labels: Sequence[str] | None,
) -> dict[str, Any]:
    """Copy `config` with as many labels as the head that an adapter brings.

    Their names are `labels`, by default those of `config` when their number is right, else LABEL_0,
    LABEL_1 and so on, as transformers has it; transformers derives num_labels from id2label.
    """
    task = tasks.likely_task(config, task_type)
    count = tasks.head_labels(shapes) if task is not None and task.labelled else None
    if labels is not None and len(labels) != count:
        expected = "no labels: the adapter brings no head" if count is None else f"{count}"
        raise UsageError("labels", expected=expected, found=str(len(labels)))
    if labels is not None and (len(set(labels)) != len(labels) or "" in labels):
        # label2id would lose one of two equal names.
        raise UsageError("labels", expected="different names", found=", ".join(map(repr, labels)))
    known = config.get("id2label")
    if count is None or (labels is None and isinstance(known, dict) and len(known) == count):
        return dict(config)
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(count)]
    changed = {key: value for key, value in config.items() if key != "num_labels"}
    changed["id2label"] = {str(i): name for i, name in enumerate(names)}
    changed["label2id"] = {name: i for i, name in enumerate(names)}
    return changed
