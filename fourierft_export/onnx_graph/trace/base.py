"""A base model as a graph, and where an adapter's layers and saved tensors are in it.

The exporter keeps a weight's name only where the weight is used as it is stored: before a MatMul it
is transposed and gets a number for a name. It also shares equal constants, and computes equal nodes
once. So the graph is traced with markers in place of these tensors: random numbers, no two equal
and none its own transpose. The initializer that holds a marker afterwards is that tensor. Then the
base's own numbers are put back.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...adapt.base_linear import is_conv1d, layer_shape, to_array
from ...errors import BadInputError
from ...types import Array
from ..graph.ops import constant_value
from ..graph.source import Source
from ..locate.saved import Place
from ..locate.site import Site
from ..locate.weight_uses import find_linear_uses, use_of
from .trace import Inputs, trace

if TYPE_CHECKING:
    import onnx_ir as ir


_WITH_GRAPHS = ("If", "Loop", "Scan")  # these may take more than their inputs


def trace_base(
    model: nn.Module,
    example_inputs: Inputs,
    layers: Iterable[str],
    saved: Iterable[str] = (),
    *,
    absent: Container[str] = (),
    **options: Any,
) -> tuple[Source, dict[str, list[Site]], dict[str, list[Place]]]:
    """Trace a model; return its graph, the layers' sites and the saved tensors' places.

    Args:
        model: without adapters; it is as it was afterwards.
        example_inputs: a tuple of positional arguments, or a mapping of keyword arguments.
        options: input and output names, dynamic shapes and opset, for `trace`.
        layers: module paths of linear layers with float weights.
        saved: names of the float tensors to find besides.
        absent: those of them that are zeros in the graph.
    """
    modules = {path: model.get_submodule(path) for path in layers}
    of_layer = {f"{path}.weight": path for path in modules}
    saved = list(saved)
    base = {name: tensor_of(model, name) for name in (*of_layer, *saved)}
    random = torch.Generator().manual_seed(0)
    markers = {n: torch.randn(t.shape, generator=random).to(t) for n, t in base.items()}
    arrays = {name: to_array(marker) for name, marker in markers.items()}
    with replaced_tensors(model, markers):
        optimise = partial(_optimise, markers=arrays)
        graph = trace(model, example_inputs, optimise=optimise, **options)
    found = find_markers(graph, arrays)
    missing = [name for name, places in found.items() if not places]
    if missing:
        raise BadInputError(
            "exported graph",
            expected="the weight of every adapted layer, and every saved tensor, as a constant",
            found=f"{len(missing)} of {len(found)} that are not there",
            remedy="check that forward() uses them with the example inputs, or leave them out of "
            "the adapter",
            offenders=[of_layer.get(name, name) for name in missing],
        )
    for name, held in found.items():
        array = to_array(base[name])
        for value, transposed in held:
            content = np.zeros_like(array) if name in absent else array
            put_back = constant_value(content.T if transposed else content, str(value.name))
            value.const_value = put_back.const_value
    sites = {
        path: [
            _site(graph, path, module, value, transposed)
            for value, transposed in found[f"{path}.weight"]
        ]
        for path, module in modules.items()
    }
    places = {
        name: [
            Place(value, tuple(value.uses()), stored_transposed)
            for value, stored_transposed in found[name]
        ]
        for name in saved
    }
    return Source(Path("exported graph"), graph), sites, places


def _site(
    graph: ir.Model, path: str, module: nn.Module, value: ir.Value, stored_transposed: bool
) -> Site:
    """The layer's place: whoever reads its weight in the trace reads the layer's own weight."""
    transposed = stored_transposed != is_conv1d(module)
    linear = find_linear_uses(graph, value)
    known = {(use.node, use.index) for use in linear}
    others = [
        use_of(node, index, node, transposed)
        for node, index in value.uses()
        if (node, index) not in known
    ]
    return Site(path, value, layer_shape(module), transposed, (*linear, *others))


def _optimise(program: torch.onnx.ONNXProgram, markers: Mapping[str, Array]) -> None:
    """Run torch's optimiser so that it computes no constant from a marker, only its transpose.

    It does not touch inputs of the graph. So the tensors that it would compute with, and those that
    it changed at a first attempt (by joining a layer with the norm after it), are inputs meanwhile.
    """
    from onnx_ir.passes.common import InlinePass

    InlinePass()(program.model)
    exported = program.model.clone()
    kept = _names_computed_with(exported, markers)
    for attempt in range(2):
        program.model = exported if attempt else program.model
        found = find_markers(program.model, markers)
        values = [value for name in kept for value, _ in found[name]]
        program.model.graph.inputs.extend(values)
        program.optimize()
        for value in values:
            program.model.graph.inputs.remove(value)
        changed = {name for name, held in find_markers(program.model, markers).items() if not held}
        if changed <= kept:
            return
        kept |= changed


def _names_computed_with(model: ir.Model, markers: Mapping[str, Array]) -> set[str]:
    """The markers that a node takes with constants only, in any way but to transpose them."""
    origin: dict[ir.Value, set[str]] = {}
    for graph in model.graphs():
        origin |= {value: set() for value in graph.initializers.values()}
    for name, held in find_markers(model, markers).items():
        for value, _ in held:
            origin[value].add(name)
    computed: set[str] = set()
    for node in model.graph.all_nodes():
        given = [value for value in node.inputs if value is not None]
        if all(value in origin for value in given) and node.op_type not in _WITH_GRAPHS:
            names = set().union(*(origin[value] for value in given))
            moved = node.op_type in ("Transpose", "Identity")
            origin |= {value: names if moved else set() for value in node.outputs}
            computed |= set() if moved or node.op_type in ("Shape", "Size") else names
    return computed


def find_markers(
    model: ir.Model, markers: Mapping[str, Array]
) -> dict[str, list[tuple[ir.Value, bool]]]:
    """Name -> the initializers that hold its marker, each with whether it is the transpose."""
    # The first element stays in its place under transposition.
    sizes = {marker.size for marker in markers.values()}
    held: dict[bytes, list[tuple[ir.Value, Array]]] = {}
    for value in model.graph.initializers.values():
        constant = value.const_value
        if constant is not None and constant.size in sizes:
            array = constant.numpy()
            held.setdefault(array.reshape(-1)[:1].tobytes(), []).append((value, array))
    return {
        name: [
            (value, transposed)
            for value, array in held.get(marker.reshape(-1)[:1].tobytes(), [])
            for transposed in ((False, True) if marker.ndim == 2 else (False,))
            if array.dtype == marker.dtype
            and np.array_equal(array, marker.T if transposed else marker)
        ]
        for name, marker in markers.items()
    }


@contextmanager
def replaced_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, these stand in place of the model's tensors, each under one name only."""
    before = []
    try:
        for name, tensor in tensors.items():
            store, leaf = _store(model, name)
            before.append((store, leaf, store[leaf]))
            is_parameter = isinstance(store[leaf], nn.Parameter)
            store[leaf] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        yield
    finally:
        for store, leaf, value in reversed(before):
            store[leaf] = value


def _store(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary of a module in which a tensor is, and its name there."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a model."""
    store, leaf = _store(model, name)
    tensor: Tensor = store[leaf]
    return tensor
