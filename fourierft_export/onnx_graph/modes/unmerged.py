"""Mode unmerged: base weights and spectra; standard operators make W + delta_W of them.

The new nodes depend on constants only, so ONNX Runtime folds them once, when it loads the file.
Layers with equal entries share the entries and their tables. Where a layer is quantised, there is
no float W to add to: then the adapter is a branch next to every layer, as in mode swappable, but
its tensors are constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...spectral.delta import Term
from ..adapters import layer_terms
from ..graph.ops import FLOAT32, Ops
from ..locate.site import Site
from . import functions, swappable
from .merged import put_saved
from .mode_records import Plan, Written

if TYPE_CHECKING:
    import onnx_ir as ir


def write(plan: Plan) -> Written:
    """Feed the users of each W the sum W + delta_W, which the graph rebuilds.

    The adapter's tensors are the initializers `LAYER.spectrum`, `.entries` and `.scaling`, of
    several adapters `LAYER.ADAPTER.spectrum` and so on.
    """
    written = put_saved(plan)
    if plan.has_quantised:
        branches = swappable.write(replace(plan, saved={}))
        swappable.make_constant(plan.source.model.graph, branches)
        branches.changed |= written.changed
        return branches
    functions.add_functions(plan.source.model)
    writer = _Writer(plan, written)
    for layer, several in plan.sites.items():
        terms = layer_terms(plan.adapters, layer)
        for site in several:
            writer.feed(site, terms)
    writer.ops.finish()
    return written


class _Writer:
    """Adds the sums to one graph."""

    def __init__(self, plan: Plan, written: Written) -> None:
        self.source = plan.source
        self.ops = Ops(plan.source.model.graph, ahead=True)
        self.several = len(plan.adapters) > 1
        self.written = written
        self.tables: dict[tuple[str, int, int], Sequence[ir.Value]] = {}
        self.inputs: dict[tuple[str, str], dict[str, ir.Value]] = {}
        self.names: dict[tuple[object, ...], str] = {}  # constant and consumers -> initializer

    def feed(self, site: Site, terms: Mapping[str, Term]) -> None:
        """Give the site's users W + delta_W in place of W."""
        import onnx_ir as ir

        key = site.value, site.consumers
        node, index = site.consumers[0]
        weight = node.inputs[index]  # the constant, or already the sum of another part of it
        if weight is site.value or weight is None:
            weight = site.value
            if weight.graph is not self.ops.graph or not weight.is_initializer():
                weight = self.source.isolate_constant(weight, site.consumers)
            self.names[key] = str(weight.name)
        start, name, exact = weight, f"{site.layer}.weight", weight.dtype == ir.DataType.FLOAT
        deltas = [self._delta(site, adapter, term) for adapter, term in terms.items()]
        if not exact:
            start = self.ops.op("Cast", [weight], f"{name}.float32", to=FLOAT32)
        total = self.ops.op("Sum", [start, *deltas], f"{name}.adapted")
        if not exact and weight.dtype is not None:
            total = self.ops.op("Cast", [total], f"{name}.rounded", to=int(weight.dtype))
        total.type, total.shape = weight.type, weight.shape
        for node, index in site.consumers:
            node.replace_input_with(index, total)
        self.written.add_weight(site, self.names[key], total)

    def _delta(self, site: Site, adapter: str, term: Term) -> ir.Value:
        """delta_W of one adapter, as it is added to the site's weight."""
        prefix = f"{site.layer}.{adapter}" if self.several else site.layer
        held = self._inputs(site.layer, adapter, prefix, term)
        tables = [self._table(held["entries"], axis, site.shape[axis]) for axis in (0, 1)]
        return functions.call_delta(
            self.ops, site, held["spectrum"], held["scaling"], tables, f"{prefix}.delta"
        )

    def _inputs(self, layer: str, adapter: str, prefix: str, term: Term) -> dict[str, ir.Value]:
        """The adapter's tensors for one layer, by kind."""
        key = layer, adapter
        if key not in self.inputs:
            entries = np.ascontiguousarray(term.entries, dtype=np.int64)
            scaling, spectrum = np.array(term.scaling, np.float32), term.spectrum
            if spectrum.dtype.name == "bfloat16":  # few tools read it; float32 holds it exactly
                spectrum = spectrum.astype(np.float32)
            made = {
                "entries": self.ops.constant(entries, f"{prefix}.entries"),
                "spectrum": self.ops.initializer(spectrum, f"{prefix}.spectrum"),
                "scaling": self.ops.initializer(scaling, f"{prefix}.scaling"),
            }
            self.inputs[key] = made
            self.written.terms[key] = {kind: str(value.name) for kind, value in made.items()}
        return self.inputs[key]

    def _table(self, entries: ir.Value, axis: int, length: int) -> Sequence[ir.Value]:
        """The table of one side of the matrix, which layers with equal entries share."""
        key = str(entries.name), axis, length
        if key not in self.tables:
            name = f"{entries.name}.{'columns' if axis else 'rows'}.{length}"
            self.tables[key] = functions.call_table(self.ops, entries, axis, length, name)
        return self.tables[key]
