"""Mode paired from a graph that others made: its adapted weights become inputs, an expander's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...bundle.file import Bundle
from ...errors import UsageError
from ...spectral.delta import Term
from ...types import Array
from ..fit import full_feeds
from ..graph.edits import Edits
from ..graph.source import constant_of
from ..groups import Interface, Saved, group_layers
from ..locate.marks import WeightSite
from ..locate.saved import Place
from ..locate.site import Site
from ..metadata import Written
from ..mode_names import PAIRED
from .apply_beside import SIDE_OPSET, base_fingerprints, saved_sites
from .paired import expander, write_paired
from .unpack import whole_for

if TYPE_CHECKING:
    import onnx_ir as ir

_INPUTS_IR_VERSION = 4  # the first whose inputs may have defaults
_FUNCTIONS_IR_VERSION = 8


def write_pair(
    edits: Edits,
    bundles: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    places: Mapping[str, Place],
) -> tuple[Interface, list[Written], ir.Model]:
    """Make inputs of the adapted weights, and the graph that turns an adapter into them.

    Args:
        edits: of the graph, which is changed in place; of any opset.
        bundles: adapter name -> bundle, bound; one, whose weights are the defaults.
        sites: layer -> its float weights.
        places: of the saved tensors.

    Returns:
        The expander's adapter inputs, which weights the graph takes, and the expander.

    Raises:
        UsageError: several bundles, or packed weights: all of them listed.
    """
    if len(bundles) > 1:
        raise UsageError(
            f"mode {PAIRED}",
            expected="one adapter",
            found=f"{len(bundles)}",
            remedy="apply one: the expander makes weights of any other",
        )
    packed = [
        f"{layer}: packed with others in {site.name}, and {whole_for(edits, site)}"
        for layer, several in sites.items()
        for site in several
        if site.start is not None
    ]
    if packed:
        raise UsageError(
            edits.source.path,
            expected="layers with weights of their own",
            found=f"{len(packed)} packed ones that cannot be taken apart",
            remedy="use mode merged or unmerged, which change them where they are",
            offenders=packed,
        )
    (bundle,) = bundles.values()
    source = edits.source
    weights: dict[str, tuple[Array, bool]] = {}
    located = []
    for layer, several in sites.items():
        for site in several:
            tensor = constant_of(site.value)
            if tensor is None:
                raise ValueError(f"{site.name} is no constant")
            weight = source.read(tensor)
            weights[layer] = weight.T if site.transposed else weight, False
            value = edits.own(site.value, [(use.node, use.index) for use in site.uses])
            located.append(WeightSite(layer, value, site.transposed))
    saved, base = saved_sites(edits, places)
    interface = Interface(
        group_layers([bundle]),
        tuple(Saved(name, array.shape, array.dtype.name) for name, array in base.items()),
        base_fingerprints(source, bundles, sites),
    )
    feeds = full_feeds(interface, bundle, base)
    scaling = float(bundle.spec.scaling)
    terms = {name: [Term(s, bundle.entries(name), scaling)] for name, s in bundle.spectra.items()}
    inputs = write_paired(source.model, located, weights, interface, terms, feeds, saved, base)
    source.model.ir_version = max(source.model.ir_version, _INPUTS_IR_VERSION)
    made = expander(
        inputs,
        interface,
        feeds,
        opset=max(source.opset, SIDE_OPSET),
        ir_version=max(source.model.ir_version, _FUNCTIONS_IR_VERSION),
    )
    return interface, [Written(one.layer, one.name, one.transposed, {}) for one in inputs], made
