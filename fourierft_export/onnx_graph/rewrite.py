"""Adapters written into a graph: baked into the weights, or beside them as spectra.

Both start from the graph of the bare base and change nothing but what feeds the adapted layers, so
the nodes of a merged graph are those of the base's by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..spectral.delta import Term, add_delta_weight
from . import functions
from .locate import WeightSite

if TYPE_CHECKING:
    import onnx_ir as ir

MERGED = "merged"
UNMERGED = "unmerged"
MODES = (MERGED, UNMERGED)

FLOAT32 = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class LayerTerm:
    """One adapter's share of one layer.

    Attributes:
        adapter: the adapter's name.
        term: spectrum (n,), entries (n, 2) and scaling.
        shape: (out, in) of delta_W.
    """

    adapter: str
    term: Term
    shape: tuple[int, int]


@dataclass(frozen=True)
class Written:
    """What became of one site.

    Attributes:
        site: the site.
        weight: name of the initializer that holds the weight, W or W + delta_W.
        terms: per adapter the names of its initializers: "spectrum", "entries", "scaling"; empty
            when merged.
    """

    site: WeightSite
    weight: str
    terms: Mapping[str, Mapping[str, str]]


def write_merged(
    model: ir.Model, sites: Iterable[WeightSite], terms: Mapping[str, Sequence[LayerTerm]]
) -> list[Written]:
    """Replace each weight by W + delta_W, rounded once to the weight's dtype.

    Args:
        model: changed in place. Nodes stay as they are; an initializer that other layers use too
            is left to them, and the adapted layer gets one of its own.
        sites: from `locate_weights`.
        terms: module path -> the adapters to add up.
    """
    written = []
    for site in sites:
        constant = site.value.const_value
        if constant is None:
            raise TypeError(f"{site.value.name} is no constant")
        total = add_delta_weight(
            constant.numpy(), [t.term for t in terms[site.layer]], transposed=site.transposed
        )
        if len(site.value.uses()) == len(site.uses):
            name = str(site.value.name)
            site.value.const_value = _tensor(total, name)
        else:
            value = _add_initializer(model, f"{site.layer}.weight", total)
            name = str(value.name)
            _redirect(site, value)
        written.append(Written(site, name, {}))
    return written


def write_unmerged(
    model: ir.Model, sites: Iterable[WeightSite], terms: Mapping[str, Sequence[LayerTerm]]
) -> list[Written]:
    """Feed each adapted layer W + delta_W, rebuilt in the graph from spectrum, entries, scaling.

    Args:
        model: changed in place; the arguments as in `write_merged`.
    """
    functions.add_functions(model)
    writer = _Writer(model, several=len({t.adapter for ts in terms.values() for t in ts}) > 1)
    written = [writer.write(site, terms[site.layer]) for site in sites]
    writer.finish()
    return written


class _Writer:
    """Collects the new nodes of a graph; equal entries and their tables are made once."""

    def __init__(self, model: ir.Model, several: bool) -> None:
        self.model = model
        self.several = several
        self.nodes: list[ir.Node] = []
        self.entries: dict[bytes, ir.Value] = {}
        self.tables: dict[tuple[str, int, int], tuple[ir.Value, ir.Value]] = {}
        self.names: dict[tuple[str, str], dict[str, str]] = {}
        self.values: dict[str, ir.Value] = {}

    def write(self, site: WeightSite, terms: Sequence[LayerTerm]) -> Written:
        import onnx_ir as ir

        weight = site.value
        deltas = [self._delta(site, term) for term in terms]
        exact = weight.dtype == ir.DataType.FLOAT
        start = (
            weight if exact else self._op("Cast", [weight], f"{site.layer}.weight.float32", to=1)
        )
        total = self._op("Sum", [start, *deltas], f"{site.layer}.weight.adapted")
        if not exact and weight.dtype is not None:
            rounded = f"{site.layer}.weight.rounded"
            total = self._op("Cast", [total], rounded, to=int(weight.dtype))
        _redirect(site, total)
        names = {term.adapter: self.names[site.layer, term.adapter] for term in terms}
        return Written(site, str(weight.name), names)

    def finish(self) -> None:
        """Put the new nodes at the start of the graph: they depend on constants only."""
        graph = self.model.graph
        graph.insert_before(graph[0], self.nodes)

    def _delta(self, site: WeightSite, layer_term: LayerTerm) -> ir.Value:
        spectrum, scaling, entries = self._inputs(site.layer, layer_term)
        rows, columns = layer_term.shape
        row_tables = self._tables(entries, 0, rows)
        column_tables = self._tables(entries, 1, columns)
        if site.transposed:
            rows, columns = columns, rows
            row_tables, column_tables = column_tables, row_tables
        prefix = self._prefix(site.layer, layer_term.adapter)
        return self._op(
            functions.DELTA,
            [spectrum, scaling, *row_tables, *column_tables],
            f"{prefix}.delta",
            domain=functions.DOMAIN,
            rows=rows,
            columns=columns,
        )

    def _inputs(self, layer: str, layer_term: LayerTerm) -> tuple[ir.Value, ir.Value, ir.Value]:
        prefix = self._prefix(layer, layer_term.adapter)
        key = layer, layer_term.adapter
        if key not in self.names:
            term = layer_term.term
            spectrum = self._initializer(f"{prefix}.spectrum", storable(term.spectrum))
            scaling = self._initializer(f"{prefix}.scaling", np.float32(term.scaling))
            entries = np.ascontiguousarray(term.entries, dtype=np.int64)
            content = entries.tobytes()
            if content not in self.entries:
                self.entries[content] = self._initializer(f"{prefix}.entries", entries)
            self.names[key] = {
                "spectrum": str(spectrum.name),
                "scaling": str(scaling.name),
                "entries": str(self.entries[content].name),
            }
        names = self.names[key]
        return (
            self.values[names["spectrum"]],
            self.values[names["scaling"]],
            self.values[names["entries"]],
        )

    def _initializer(self, name: str, array: npt.ArrayLike) -> ir.Value:
        value = _add_initializer(self.model, name, np.asarray(array))
        self.values[str(value.name)] = value
        return value

    def _prefix(self, layer: str, adapter: str) -> str:
        return f"{layer}.{adapter}" if self.several else layer

    def _tables(self, entries: ir.Value, axis: int, length: int) -> tuple[ir.Value, ir.Value]:
        key = str(entries.name), axis, length
        if key not in self.tables:
            import onnx_ir as ir

            side = "columns" if axis else "rows"
            node = ir.node(
                functions.TABLE,
                [entries],
                {"axis": axis, "length": length},
                domain=functions.DOMAIN,
                num_outputs=2,
                name=f"{entries.name}.{side}.{length}",
            )
            for output, what in zip(node.outputs, ("cosines", "sines"), strict=True):
                output.name = f"{node.name}.{what}"
            self.nodes.append(node)
            self.tables[key] = node.outputs[0], node.outputs[1]
        return self.tables[key]

    def _op(
        self, kind: str, inputs: Sequence[ir.Value], name: str, domain: str = "", **attributes: int
    ) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]


def storable(spectrum: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A spectrum as the graph holds it: bfloat16, which few tools read, becomes float32 (exact)."""
    return spectrum.astype(np.float32) if spectrum.dtype.name == "bfloat16" else spectrum


def _add_initializer(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new constant; the name gets a number if it is taken."""
    import onnx_ir as ir

    taken, stem, number = model.graph.initializers, name, 1
    while name in taken:
        name, number = f"{stem}.{number}", number + 1
    tensor = _tensor(array, name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def _tensor(array: npt.NDArray[Any], name: str) -> ir.TensorProtocol:
    import onnx_ir as ir

    return ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)


def _redirect(site: WeightSite, value: ir.Value) -> None:
    for node, index in site.uses:
        node.replace_input_with(index, value)
