"""From a torch model to the modes whose adapter is an input: swappable, paired, bank."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ... import __version__
from ...adapt.attach import capture
from ...adapt.layer import FourierLinear
from ...adapt.linear import stored_weight, to_array
from ...adapt.plain import swapped_layers, with_weight
from ...adapt.tree import active_adapters, adapted_modules, adapter_names, fourier_layers
from ...bundle.file import Bundle
from ...bundle.fingerprint import fingerprint
from ...errors import UsageError
from ...spectral.delta import Term
from ...types import Array
from ..bundle_record import record_bundles
from ..fit import full_feeds
from ..graph.ops import constant_value
from ..groups import BASE_PREFIX, Interface, Saved, base_feeds, group_layers, table
from ..locate.linears import SavedSite, linear_nodes, locate_saved
from ..locate.marks import WeightSite, locate_marks
from ..metadata import Written, describe
from ..mode_names import BANK, DEFAULTS, PAIRED, REQUIRED, SWAPPABLE
from ..modes.bank import write_bank
from ..modes.paired import expander, write_paired
from ..modes.swappable import write_swappable
from ..weight_input import WeightInput
from .trace import Inputs, trace

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class RuntimeGraphs:
    """What `build_runtime` made.

    Attributes:
        model: the graph.
        expander: of mode paired.
        layers: module paths of the adapted layers.
        adapters: names of the adapters in it.
    """

    model: ir.Model
    expander: ir.Model | None
    layers: tuple[str, ...]
    adapters: tuple[str, ...]


def runtime_layers(model: nn.Module, mode: str) -> dict[str, FourierLinear]:
    """The layers that a graph of this mode adapts: in a bank those of every attached adapter.

    Raises:
        UsageError: several adapters are active, and it is no bank.
    """
    names = active_adapters(model)
    if mode == BANK:
        names = adapter_names(model)
    elif len(names) > 1:
        raise UsageError(
            f"export in mode {mode}",
            expected="one active adapter",
            found=", ".join(names),
            remedy="activate one: others can be loaded into the same graph; or export a bank",
        )
    return {
        path: layer
        for path, layer in fourier_layers(model).items()
        if any(name in layer.adapters for name in names)
    }


def build_runtime(
    model: nn.Module,
    example_inputs: Inputs,
    mode: str,
    *,
    defaults: str = DEFAULTS[0],
    bundles: Mapping[str, Bundle] | None = None,
    absent: Container[str] = (),
    **tracing: Any,
) -> RuntimeGraphs:
    """The graph of `model`, with inputs for an adapter.

    Args:
        model: with `FourierLinear` layers; as it was afterwards.
        example_inputs: as in `export_onnx`.
        mode: "swappable", "paired" or "bank".
        defaults: one of `modes.DEFAULTS`.
        bundles: as in `export_onnx`.
        absent: as in `export_onnx`.
        tracing: options of `trace`.

    Raises:
        UsageError, BadInputError, BaseMismatchError: as in `export_onnx`.
    """
    layers = runtime_layers(model, mode)
    names = adapter_names(model) if mode == BANK else active_adapters(model)
    adapters = {name: capture(model, name) for name in names}
    base = _base_tensors(model, adapters)
    base |= {name: np.zeros_like(array) for name, array in base.items() if name in absent}
    marks = _Marks(layers, base)
    with marks.on(model):
        graph = trace(model, example_inputs, **tracing)
    sites = locate_marks(graph, {path: to_array(mark) for path, mark in marks.layers.items()})
    saved = locate_saved(graph, {name: to_array(mark) for name, mark in marks.saved.items()})
    weights = {
        path: (to_array(stored_weight(layer.linear)), layer.fan_in_fan_out)
        for path, layer in layers.items()
    }
    interface = Interface(
        group_layers([*adapters.values()]),
        tuple(Saved(n, array.shape, array.dtype.name, n in absent) for n, array in base.items()),
        {path: fingerprint(weight) for path, (weight, _) in weights.items()},
    )
    given = [full_feeds(interface, bundle, base) for bundle in adapters.values()]
    nothing = base_feeds(interface.groups) | base
    kept = adapters if defaults == DEFAULTS[0] else {}
    first = given[0] if kept else nothing
    made: ir.Model | None = None
    if mode == BANK:
        put_weights(sites, weights)
        feeds = table(interface.groups, given if kept else [nothing])
        write_bank(graph, _nodes(sites), interface, feeds, saved, base)
    elif mode == SWAPPABLE:
        put_weights(sites, weights)
        write_swappable(graph, _nodes(sites), interface, first, saved, base)
    elif mode == PAIRED:
        made = _pair(graph, sites, weights, interface, kept, first, saved, base)
    content = describe(
        version=__version__,
        mode=mode,
        adapters=kept,
        sources=bundles or {},
        written=_written(sites, weights, mode),
        interface=interface,
    )
    for one in (graph, made):
        if one is not None:
            one.metadata_props.update(content)
            if kept:
                record_bundles(one, adapters | dict(bundles or {}))
            if defaults == REQUIRED:
                require_inputs(one.graph, base)
    return RuntimeGraphs(graph, made, tuple(layers), tuple(adapters))


def require_inputs(graph: ir.Graph, base: Mapping[str, Array]) -> None:
    """Take the defaults of all inputs away; the base's saved tensors stay as constants."""
    for value in graph.inputs:
        if graph.initializers.pop(str(value.name), None) is not None:
            value.const_value = None
            kept = BASE_PREFIX + str(value.name)
            if value.name in base and kept not in graph.initializers:
                graph.register_initializer(constant_value(base[str(value.name)], kept))


def put_weights(sites: Sequence[WeightSite], weights: Mapping[str, tuple[Array, bool]]) -> None:
    """The base weights in place of the marks."""
    import onnx_ir as ir

    for site in sites:
        stored = weights[site.layer][0]
        array = np.ascontiguousarray(stored.T if site.turned else stored)
        site.value.const_value = ir.tensor(array, name=site.value.name)


def _nodes(sites: Sequence[WeightSite]) -> dict[str, list[ir.Node]]:
    nodes: dict[str, list[ir.Node]] = {}
    for site in sites:
        nodes.setdefault(site.layer, []).extend(linear_nodes(site))
    return nodes


def _pair(
    graph: ir.Model,
    sites: Sequence[WeightSite],
    weights: Mapping[str, tuple[Array, bool]],
    interface: Interface,
    adapters: Mapping[str, Bundle],
    defaults: Mapping[str, Array],
    saved: Sequence[SavedSite],
    base: Mapping[str, Array],
) -> ir.Model:
    terms = {
        layer: [bundle_term(bundle, layer)]
        for bundle in adapters.values()
        for layer in bundle.spectra
    }
    inputs: list[WeightInput] = write_paired(
        graph, sites, weights, interface, terms, defaults, saved, base
    )
    return expander(
        inputs,
        interface,
        defaults,
        opset=graph.opset_imports[""],
        ir_version=graph.ir_version,
    )


def bundle_term(bundle: Bundle, layer: str) -> Term:
    """One layer's share of an adapter."""
    return Term(bundle.spectra[layer], bundle.entries(layer), float(bundle.spec.scaling))


def _written(
    sites: Sequence[WeightSite], weights: Mapping[str, tuple[Array, bool]], mode: str
) -> Iterator[Written]:
    for site in sites:
        name = f"{site.layer}.weight" if mode == PAIRED else str(site.value.name)
        yield Written(site.layer, name, site.turned != weights[site.layer][1], {})


def _base_tensors(model: nn.Module, adapters: Mapping[str, Bundle]) -> dict[str, Array]:
    """What the base has under the names of the adapters' saved tensors, in natural order."""
    modules = {path: module.original for path, module in adapted_modules(model).items()}
    base = {}
    for name in sorted({name for bundle in adapters.values() for name in bundle.saved}):
        path, _, leaf = name.rpartition(".")
        array = to_array(getattr(modules[path], leaf))
        if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
            base[name] = array
    return base


class _Marks:
    """Random tensors that stand for the adapted weights and the saved tensors while tracing."""

    def __init__(self, layers: Mapping[str, FourierLinear], base: Mapping[str, Array]) -> None:
        random = torch.Generator().manual_seed(0)
        weights = {path: stored_weight(layer.linear) for path, layer in layers.items()}
        self.layers = {p: torch.randn(w.shape, generator=random).to(w) for p, w in weights.items()}
        self._random = random
        self.saved: dict[str, torch.Tensor] = {}
        self._names = tuple(base)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block, `model` is its base with the marks in it."""

        def stand_in(path: str, layer: FourierLinear) -> nn.Module:
            mark = self.layers.get(path, stored_weight(layer.linear))
            return with_weight(layer.linear, mark)

        with swapped_layers(model, stand_in):
            before: list[tuple[dict[str, Any], str, Any]] = []
            try:
                for name in self._names:
                    path, _, leaf = name.rpartition(".")
                    module = model.get_submodule(path)
                    is_parameter = leaf in module._parameters
                    store: dict[str, Any] = module._parameters if is_parameter else module._buffers
                    value = store[leaf]
                    mark = torch.randn(value.shape, generator=self._random).to(value)
                    before.append((store, leaf, value))
                    store[leaf] = nn.Parameter(mark, requires_grad=False) if is_parameter else mark
                    self.saved[name] = mark
                yield
            finally:
                for store, leaf, value in reversed(before):
                    store[leaf] = value
