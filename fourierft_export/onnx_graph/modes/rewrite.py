"""Adapters written into a graph: baked into the weights, or beside them as spectra.

Both start from the graph of the base, traced with marks for the adapted weights, and change nothing
but what feeds those layers: so the nodes of a merged graph are the base's by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...spectral.delta import Term, add_delta_weight
from ..graph.ops import FLOAT32, constant_value, free_name
from ..locate.marks import WeightSite
from ..metadata import Written
from . import functions

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class LayerTerm:
    """One adapter's share of one layer.

    Attributes:
        adapter: the adapter's name.
        term: spectrum (n,), entries (n, 2) and scaling.
    """

    adapter: str
    term: Term


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A layer to adapt.

    Attributes:
        weight: the base weight as stored; float32, float16 or bfloat16.
        fan_in_fan_out: that is (in, out), not (out, in).
        terms: the adapters that add up.
    """

    weight: npt.NDArray[Any]
    fan_in_fan_out: bool
    terms: tuple[LayerTerm, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of delta_W."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.fan_in_fan_out else (rows, columns)


def write_merged(sites: Iterable[WeightSite], layers: Mapping[str, AdaptedLayer]) -> list[Written]:
    """Put W + delta_W in place of each mark, rounded once to the weight's dtype.

    Args:
        sites: from `locate_marks`; their graph is changed in place, its nodes stay as they are.
        layers: module path -> what belongs there.
    """
    written = []
    for site in sites:
        layer = layers[site.layer]
        total = add_delta_weight(
            layer.weight, [t.term for t in layer.terms], transposed=layer.fan_in_fan_out
        )
        written.append(_put_weight(site, layer, total))
    return written


def write_unmerged(
    model: ir.Model, sites: Iterable[WeightSite], layers: Mapping[str, AdaptedLayer]
) -> list[Written]:
    """Put W in place of each mark, and feed its users W + delta_W, which the graph rebuilds.

    Args:
        model: the sites' graph, changed in place.
        sites, layers: as in `write_merged`.
    """
    functions.add_functions(model)
    names = {term.adapter for layer in layers.values() for term in layer.terms}
    writer = Writer(model, several=len(names) > 1)
    written = [writer.write(site, layers[site.layer]) for site in sites]
    writer.finish()
    return written


def _put_weight(site: WeightSite, layer: AdaptedLayer, weight: npt.NDArray[Any]) -> Written:
    """Make `weight`, given as the layer stores it, the content of the site's initializer."""
    name = str(site.value.name)
    content = weight.T if site.turned else weight
    site.value.const_value = constant_value(content, name).const_value
    return Written(site.layer, name, site.turned != layer.fan_in_fan_out, {})


class Writer:
    """Collects the new nodes of a graph; equal entries and their tables are made once."""

    def __init__(self, model: ir.Model, several: bool) -> None:
        self.model = model
        self.several = several
        self.nodes: list[ir.Node] = []
        self.names = {str(value.name) for node in model.graph for value in node.outputs}
        self.entries: dict[bytes, ir.Value] = {}
        self.tables: dict[tuple[str, int, int], Sequence[ir.Value]] = {}
        self.inputs: dict[tuple[str, str], dict[str, ir.Value]] = {}

    def write(self, site: WeightSite, layer: AdaptedLayer) -> Written:
        """Put W in the site's initializer, and feed its users W + delta_W."""
        users = tuple(site.value.uses())
        return self.feed(_put_weight(site, layer, layer.weight), site.value, users, layer)

    def feed(
        self,
        written: Written,
        weight: ir.Value,
        users: Sequence[tuple[ir.Node, int]],
        layer: AdaptedLayer,
        *,
        pads: Sequence[int] | None = None,
    ) -> Written:
        """Feed `users` of a weight that is in the graph W + delta_W.

        Args:
            written: the layer, and how the graph holds its weight.
            weight: the constant, or what else stands for the weight.
            users: (node, index of the input) each.
            layer: its shape and terms count, its weight does not.
            pads: rows and columns before, rows and columns after, by which a packed weight is
                larger than the layer's part of it.

        Returns:
            `written` with the names of the adapters' tensors.
        """
        import onnx_ir as ir

        name = f"{written.layer}.weight"
        inputs = [self._inputs(written.layer, term) for term in layer.terms]
        deltas = []
        for term, given in zip(layer.terms, inputs, strict=True):
            prefix = f"{self._prefix(written.layer, term.adapter)}.delta"
            delta = self._delta(prefix, layer, given, written)
            if pads is not None:
                sizes = self._initializer(f"{prefix}.pads", np.array(pads, np.int64))
                delta = self._op("Pad", [delta, sizes], f"{prefix}.padded")
            deltas.append(delta)
        exact = weight.dtype == ir.DataType.FLOAT
        start = weight if exact else self._op("Cast", [weight], f"{name}.float32", to=FLOAT32)
        total = self._op("Sum", [start, *deltas], f"{name}.adapted")
        if not exact and weight.dtype is not None:
            total = self._op("Cast", [total], f"{name}.rounded", to=int(weight.dtype))
        total.type, total.shape = weight.type, weight.shape
        for node, index in users:
            node.replace_input_with(index, total)
        terms = {
            term.adapter: {kind: str(value.name) for kind, value in given.items()}
            for term, given in zip(layer.terms, inputs, strict=True)
        }
        return replace(written, terms=terms)

    def finish(self) -> None:
        """Put the new nodes at the start of the graph: they depend on constants only."""
        graph = self.model.graph
        graph.insert_before(graph[0], self.nodes)

    def _delta(
        self, name: str, layer: AdaptedLayer, inputs: Mapping[str, ir.Value], written: Written
    ) -> ir.Value:
        """delta_W in the layout of the graph's weight."""
        sides = [self._table(inputs["entries"], axis, layer.shape[axis]) for axis in (0, 1)]
        rows, columns = reversed(sides) if written.transposed else sides
        given = [inputs["spectrum"], inputs["scaling"], *rows, *columns]
        return self._op(functions.DELTA, given, name, domain=functions.DOMAIN)

    def _inputs(self, layer: str, layer_term: LayerTerm) -> dict[str, ir.Value]:
        """The adapter's tensors for one layer, by kind."""
        prefix, term = self._prefix(layer, layer_term.adapter), layer_term.term
        key = layer, layer_term.adapter
        if key not in self.inputs:
            entries = np.ascontiguousarray(term.entries, dtype=np.int64)
            content = entries.tobytes()
            if content not in self.entries:
                self.entries[content] = self._initializer(f"{prefix}.entries", entries)
            self.inputs[key] = {
                "spectrum": self._initializer(f"{prefix}.spectrum", storable(term.spectrum)),
                "entries": self.entries[content],
                "scaling": self._initializer(f"{prefix}.scaling", np.float32(term.scaling)),
            }
        return self.inputs[key]

    def _initializer(self, name: str, array: npt.ArrayLike) -> ir.Value:
        return _add_initializer(self.model, name, np.asarray(array))

    def _prefix(self, layer: str, adapter: str) -> str:
        return f"{layer}.{adapter}" if self.several else layer

    def _table(self, entries: ir.Value, axis: int, length: int) -> Sequence[ir.Value]:
        """The outputs of FourierTable for one side of the matrix."""
        key = str(entries.name), axis, length
        if key not in self.tables:
            import onnx_ir as ir

            node = ir.node(
                functions.TABLE,
                [entries],
                {"axis": axis, "length": length},
                domain=functions.DOMAIN,
                num_outputs=len(functions.TABLE_OUTPUTS),
                name=f"{entries.name}.{'columns' if axis else 'rows'}.{length}",
            )
            for output, what in zip(node.outputs, functions.TABLE_OUTPUTS, strict=True):
                output.name = f"{node.name}.{what}"
            self.nodes.append(node)
            self.tables[key] = node.outputs
        return self.tables[key]

    def _op(
        self, kind: str, inputs: Sequence[ir.Value], name: str, domain: str = "", **attributes: int
    ) -> ir.Value:
        import onnx_ir as ir

        name = free_name(name, self.names)
        self.names.add(name)
        node = ir.node(kind, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]


def storable(spectrum: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A spectrum as the graph holds it: bfloat16, which few tools read, becomes float32 (exact)."""
    return spectrum.astype(np.float32) if spectrum.dtype.name == "bfloat16" else spectrum


def _add_initializer(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new constant; the name gets a number if it is taken."""
    value = constant_value(array, free_name(name, model.graph.initializers))
    model.graph.register_initializer(value)
    return value
