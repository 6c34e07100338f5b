"""Bundles into an ONNX file that exists already, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from .. import __version__
from ..bundle.combine import checked_weights
from ..bundle.file import Bundle
from ..errors import BaseMismatchError, UsageError
from ..files.staging import check_output
from ..models.base import open_base
from ..types import Progress
from .bundle_record import record_bundles
from .graph.edits import Edits
from .graph.source import Source, open_onnx
from .graph.write import data_path, refuse_inputs, write_model
from .locate.belonging import bound_to, judge, wanted_layers
from .locate.finder import Finder
from .locate.saved import find_saved
from .locate.search import search
from .locate.site import Site
from .metadata import KEY, Written, describe
from .mode_names import BANK, MERGED, MODES, PAIRED, SWAPPABLE, UNMERGED
from .modes.apply_beside import write_beside
from .modes.apply_paired import write_pair
from .modes.heads import float_heads
from .modes.put_saved import put_saved
from .modes.sites import Job, feed_sites, merge_sites
from .modes.unpack import unpack_sites
from .report import ExportReport, fed_shapes, value_shapes
from .runtime_paths import expander_path
from .several import Bundles, named_bundles, weighted

MIN_OPSET = {UNMERGED: 13}


def apply_onnx(
    onnx_in: str | os.PathLike[str],
    bundles: Bundles,
    onnx_out: str | os.PathLike[str],
    *,
    mode: str = MERGED,
    weights: Sequence[float] | None = None,
    base: str | os.PathLike[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    allow_base_mismatch: bool = False,
    allow_links: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Put adapters into an ONNX file that other tools made; several add up.

    Each layer's weight is found by its name, by the scope or name of the node that uses it, by the
    bias beside it, or by its content, which a bound bundle (or `base`) tells; never by shape alone.
    A weight that other nodes use too is changed for the adapter's layers only. Functions that hold
    layers of the adapter are expanded; others stay. Weights in external data stay on disk: memory
    holds one at a time.

    Args:
        onnx_in: an .onnx file of any opset and IR version (unmerged: opset 13 or newer; beside
            quantised weights, swappable and bank: 18 or newer).
        bundles: one adapter, several that add up, or several by name.
        onnx_out: the file to write; external data goes to `onnx_out` + ".data".
        mode: "merged", "unmerged", "swappable", "paired" or "bank", as in `export_onnx`. Beside a
            quantised weight, which stays as it is, the adapter is a float branch (not in modes
            merged and paired). Run int8 files with the session option
            `session.x64quantprecision` = "1", as `AdapterSession` does: without it, ONNX Runtime's
            int8 sums saturate on x86-64 CPUs that lack VNNI.
        weights: one factor per bundle, by which its change counts; 1 by default.
        base: the checkpoint that the graph was made from: binds unbound bundles, and finds
            weights by content.
        mapping: layer -> initializer, or `initializer[start:stop]` (outputs) in a packed weight,
            for layers that are not found otherwise; of a quantised weight, its integers.
        allow_base_mismatch: accept weights other than those the adapter was trained on.
        allow_links: follow links of external data that end inside the model's folder.
        force: replace an existing output.
        progress: called with (what, done, total).

    Returns:
        What was written.

    Raises:
        UsageError: unknown mode or mapping, an output that exists, an opset too old for the mode.
        BadInputError: not an ONNX model, external data that must not be read, or weights that
            overflow their dtype.
        BaseMismatchError: layers that are not found, have another shape, or hold another weight
            than the adapter's: all of them listed, with the candidates.
        FileAccessError: a file is missing, or the output cannot be written.
    """
    named = named_bundles(bundles)
    factors = checked_weights(weights, len(named))
    _check_arguments(mode, named, mapping or {})
    inputs = (onnx_in,) if base is None else (onnx_in, base)
    check_output(onnx_out, force=force, inputs=inputs)
    if mode == PAIRED:
        check_output(expander_path(onnx_out), force=force, inputs=inputs)
    source = open_onnx(onnx_in, allow_links=allow_links)
    refuse_inputs(onnx_out, (*inputs, *source.files))
    _check_source(source, mode)
    opened = None if base is None else open_base(base)
    bound = {
        name: bundle if opened is None or bundle.is_bound else bundle.bind(opened)
        for name, bundle in named.items()
    }
    if progress:
        progress("find weights", 0, 1)
    wanted = wanted_layers(bound, opened)
    finder, found, expanded = search(
        source, wanted, mapping or {}, bound, beside=mode in (SWAPPABLE, BANK)
    )
    notes = (*expanded, *judge(source, found, allow_base_mismatch))
    quantised = {layer: each for layer, each in found.sites.items() if each[0].quantised}
    saved = {name for bundle in bound.values() for name in bundle.saved}
    heads = float_heads(source, finder.linears, saved, found.bridge)
    if heads:
        finder = Finder(source)
        listed = ", ".join(one.weight for one in heads)
        notes += (f"{listed}: quantised in the input, and float here to take the adapter's own",)
    _check_quantised(source, mode, quantised)
    shapes = {layer: sites[0].shape for layer, sites in found.sites.items()}
    bound = {name: bound_to(bundle, shapes) for name, bundle in bound.items()}
    edits = Edits(source)
    places = find_saved(finder, found.bridge, bound)
    adapters = weighted(bound, factors)
    interface, made = None, None
    written: list[Written] = []
    if mode in (MERGED, UNMERGED):
        put_saved(places, edits, bound)
        places = {}
    sites: Mapping[str, Sequence[Site]] = {
        layer: each for layer, each in found.sites.items() if layer not in quantised
    }
    if mode == PAIRED:
        sites = unpack_sites(edits, sites)
        interface, written, made = write_pair(edits, adapters, sites, places)
    elif mode in (SWAPPABLE, BANK) or (quantised and mode == UNMERGED):
        interface = write_beside(edits, mode, adapters, sites, quantised, places)
        if quantised:
            notes += (
                f"{len(quantised)} layers are quantised: the adapter is a float branch beside",
            )
    else:
        job = Job(source, edits, adapters, sites)
        written = (merge_sites if mode == MERGED else feed_sites)(job)
    content = describe(
        version=__version__,
        mode=mode,
        adapters=adapters,
        sources=named,
        written=written,
        interface=interface,
    )
    for graph in (source.model, made):
        if graph is not None:
            graph.metadata_props.update(content)
            if mode != MERGED:
                record_bundles(graph, named, inputs=mode != UNMERGED)
    expanders = () if made is None else write_model(made, expander_path(onnx_out), force=force)
    files = (*edits.write(onnx_out, force=force, progress=progress), *expanders)
    beside = data_path(files[0])
    return ExportReport(
        path=str(files[0]),
        data=str(beside) if beside in files else None,
        bytes=sum(file.stat().st_size for file in files),
        mode=mode,
        opset=source.opset,
        nodes=len(source.model.graph),
        inputs=fed_shapes(source.model.graph),
        outputs=value_shapes(source.model.graph.outputs),
        layers=tuple(shapes),
        adapters=tuple(named),
        notes=notes,
    )


def _check_arguments(mode: str, bundles: Mapping[str, Bundle], mapping: Mapping[str, str]) -> None:
    if mode not in MODES:
        raise UsageError("apply mode", expected=", ".join(MODES), found=repr(mode))
    layers = {layer.name for bundle in bundles.values() for layer in bundle.layers}
    unknown = sorted(mapping.keys() - layers)
    if unknown:
        raise UsageError(
            "mapping",
            expected="layers of the adapter",
            found=", ".join(unknown[:3]),
            remedy="see the adapter's layers with: fourierft-export inspect BUNDLE",
        )


def _check_source(source: Source, mode: str) -> None:
    needed = MIN_OPSET.get(mode, 0)
    if source.opset < needed:
        raise UsageError(
            source.path,
            expected=f"opset {needed} or newer for mode {mode}",
            found=f"opset {source.opset}",
            remedy="use --mode merged, or convert the model with onnx.version_converter first",
        )
    if (
        KEY in source.model.metadata_props
        and '"mode":"merged"' not in (source.model.metadata_props[KEY])
    ):
        raise UsageError(
            source.path,
            expected="a model without adapters of its own",
            found="one that holds some, unmerged",
            remedy="apply all bundles together to the base's model",
        )


def _check_quantised(source: Source, mode: str, quantised: Mapping[str, Sequence[Site]]) -> None:
    if mode in (MERGED, PAIRED) and quantised:
        raise BaseMismatchError(
            source.path,
            expected="float weights to merge into",
            found=f"{len(quantised)} quantised ones: quantising W + delta_W again would lose most "
            "of the adapter",
            remedy="use --mode unmerged, swappable or bank, which add a float branch beside them",
            offenders=[f"{layer}: {each[0].describe()}" for layer, each in quantised.items()],
        )
