"""Adapters written into an open graph at the sites found: merged, or as spectra beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.file import Bundle
from ...errors import BadInputError
from ...spectral.delta import Term, add_delta_weight
from ...types import Array
from ..graph.edits import Edits
from ..graph.source import Source, constant_of
from ..locate.content import part_of
from ..locate.site import Site
from ..metadata import Written
from .functions import add_functions
from .rewrite import AdaptedLayer, LayerTerm, Writer

if TYPE_CHECKING:
    import onnx_ir as ir

_FUNCTIONS_IR_VERSION = 8


@dataclass(frozen=True, eq=False)
class Job:
    """An open graph, and what goes where in it.

    Attributes:
        source: the graph.
        edits: changes to its constants.
        bundles: adapter name -> bundle, bound, its scaling times its weight.
        sites: layer -> where its weight is.
    """

    source: Source
    edits: Edits
    bundles: Mapping[str, Bundle]
    sites: Mapping[str, Sequence[Site]]

    def terms(self, layer: str) -> tuple[LayerTerm, ...]:
        """The adapters' shares in one layer."""
        return tuple(
            LayerTerm(
                name,
                Term(bundle.spectra[layer], bundle.entries(layer), float(bundle.spec.scaling)),
            )
            for name, bundle in self.bundles.items()
            if layer in bundle.spectra
        )


def merge_sites(job: Job) -> list[Written]:
    """W + delta_W in place of each W, rounded once to its dtype."""
    written = []
    parts: dict[str, tuple[ir.Value, list[Site]]] = {}
    for sites in job.sites.values():
        for site in sites:
            value = _owned(job, site, parts)
            parts.setdefault(str(value.name), (value, []))[1].append(site)
            written.append(Written(site.layer, str(value.name), site.transposed, {}))
    for name, (value, group) in parts.items():
        tensor = constant_of(value)
        if tensor is None:
            raise ValueError(f"{name} is no constant")

        def make(
            tensor: ir.TensorProtocol = tensor, group: list[Site] = group, name: str = name
        ) -> Array:
            return _merged(job, tensor, group, name)

        job.edits.put(value, make)
    return written


def _owned(job: Job, site: Site, parts: Mapping[str, tuple[ir.Value, list[Site]]]) -> ir.Value:
    """The constant to change for a site: a copy, where others keep the base's weight."""
    if not site.shared:
        return site.value
    for value, group in parts.values():
        if any(one.value is site.value and one.uses == site.uses for one in group):
            return value  # another part of the same packed weight
    return job.edits.own(site.value, [(use.node, use.index) for use in site.uses])


def _merged(job: Job, tensor: ir.TensorProtocol, group: Sequence[Site], name: str) -> Array:
    weight = job.source.read(tensor)
    total = weight if all(site.start is None for site in group) else weight.copy()
    for site in group:
        terms = [term.term for term in job.terms(site.layer)]
        part = part_of(weight, site.transposed, site.start, site.shape[0])
        with np.errstate(over="ignore"):  # judged by its result
            new = add_delta_weight(part, terms, transposed=site.transposed)
        if not np.isfinite(new).all():
            raise BadInputError(
                f"weight {name}",
                expected=f"W + delta_W within {new.dtype.name}",
                found="an overflow, or values that are not finite",
                remedy="check the adapter's scaling, or use a model of a wider dtype",
            )
        if site.start is None:
            total = new
        else:
            part_of(total, site.transposed, site.start, site.shape[0])[...] = new
    return total


def feed_sites(job: Job) -> list[Written]:
    """The users of each W get W + delta_W, which the graph rebuilds."""
    model = job.source.model
    add_functions(model)
    model.ir_version = max(model.ir_version, _FUNCTIONS_IR_VERSION)
    writer = Writer(model, several=len(job.bundles) > 1)
    written: list[Written] = []
    for sites in job.sites.values():
        for site in sites:
            users = [(use.node, use.index) for use in site.uses]
            node, index = users[0]
            current = node.inputs[index]  # the constant, or already the sum of another part
            if current is site.value:
                current = _in_main_graph(job, site)
                site_value = str(current.name)
            else:
                site_value = next(w.weight for w in written if _same_value(w, site, job))
            if current is None:
                raise ValueError(f"{site.name} is not used any more")
            layer = AdaptedLayer(
                np.broadcast_to(np.float32(0), site.shape), False, job.terms(site.layer)
            )
            start = Written(site.layer, site_value, site.transposed, {})
            written.append(writer.feed(start, current, users, layer, pads=_pads(site)))
    writer.finish()
    return written


def _same_value(written: Written, site: Site, job: Job) -> bool:
    return any(one.value is site.value for one in job.sites[written.layer])


def _in_main_graph(job: Job, site: Site) -> ir.Value:
    """The site's constant as an initializer of the main graph, where new nodes can reach it."""
    value = site.value
    if value.graph is job.source.model.graph and value.is_initializer():
        return value
    return job.edits.own(value, [(use.node, use.index) for use in site.uses])


def _pads(site: Site) -> tuple[int, int, int, int] | None:
    """Zeros around a layer's delta_W, in the layout of the packed weight that it is a part of."""
    if site.start is None:
        return None
    before, after = site.start, site.outputs - site.start - site.shape[0]
    return (0, before, 0, after) if site.transposed else (before, 0, after, 0)
