"""The records of every mode: what is to be written into a graph, and what was written."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...bundle.bundle import Bundle
from ...types import Array
from ..adapter_interface import Interface
from ..graph.source import Source
from ..locate.saved import Place
from ..locate.site import Site
from ..mode_names import DEFAULTS

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Plan:
    """Adapters, and the places in a graph that they go to.

    Attributes:
        source: the graph, which is changed in place.
        adapters: adapter name -> bundle, bound to the graph, scaled by its weight.
        sites: layer -> its sites.
        saved: saved tensor -> its places.
        sources: adapter name -> the bundle as it was given.
        defaults: one of `mode_names.DEFAULTS`.
        absent: saved tensors that the base lacks.
    """

    source: Source
    adapters: Mapping[str, Bundle]
    sites: Mapping[str, Sequence[Site]]
    saved: Mapping[str, Sequence[Place]]
    sources: Mapping[str, Bundle]
    defaults: str = DEFAULTS[0]
    absent: Container[str] = ()

    @property
    def every_site(self) -> list[Site]:
        """The sites of all layers."""
        return [site for several in self.sites.values() for site in several]

    @property
    def has_quantised(self) -> bool:
        """Whether any layer is quantised."""
        return any(site.quantised for site in self.every_site)


@dataclass(eq=False)
class Written:
    """What a mode wrote into a graph.

    Attributes:
        weights: layer -> (initializer or input that holds its weight, whether as (in, out), its
            first output there where mode paired takes several layers in one input) each.
        terms: (layer, adapter) -> names of its initializers "spectrum", "entries" and "scaling".
        changed: layer or saved tensor -> the values by which it reaches the rest of the graph.
        interface: the adapter inputs; None where there are none.
        base: the base's saved tensors, where they are inputs.
        expander: of mode paired.
        nodes: the nodes that a quantiser must leave alone: the adapter's, and those it is fed to.
    """

    weights: dict[str, list[tuple[str, bool, int | None]]] = field(default_factory=dict)
    terms: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    changed: dict[str, list[ir.Value]] = field(default_factory=dict)
    interface: Interface | None = None
    base: Mapping[str, Array] = field(default_factory=dict)
    expander: ir.Model | None = None
    nodes: Sequence[str] = ()

    def add_weight(self, site: Site, name: str, value: ir.Value, start: int | None = None) -> None:
        """Note the name of the constant or input with a layer's weight, and its adapted value."""
        self.weights.setdefault(site.layer, []).append((name, site.transposed, start))
        self.changed.setdefault(site.layer, []).append(value)
