"""Bundles into an ONNX file that exists already, without torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..bundle.bundle import Bundle
from ..bundle.combine import checked_weights
from ..bundle.fingerprint import fingerprint
from ..bundle.fit import Fit, FoundLayer, LayerVerdict, check_fits, fit_adapter
from ..bundle.layer_templates import compress
from ..bundle.spec import Fingerprint
from ..errors import BaseMismatchError, UsageError, first_line
from ..models.base_tensors import Base, open_base
from ..types import Progress
from .adapter_interface import KEY
from .adapters import Bundles, bundle_sources, named_bundles, weighted, without
from .graph.inline import expand_functions, inline_functions
from .graph.shapes import fill_shapes
from .graph.source import Source, open_onnx
from .graph.write import check_model_output, write_model
from .locate.finder import Finder, Found
from .locate.join_split_layers import join_parts
from .locate.saved import find_saved, missing_saved
from .locate.site import Site, Wanted, compare_site
from .mode_names import BANK, DEFAULTS, MERGED, PAIRED, SWAPPABLE, UNMERGED
from .modes.batch_dimension import batch_of
from .modes.mode_records import Plan
from .modes.quantised_heads import float_heads
from .modes.write_mode import check_mode, write_adapters
from .report import ExportReport, report_on

_SIDE_OPSET = 16  # of a graph with side branches


def apply_onnx(
    onnx_in: str | os.PathLike[str],
    bundles: Bundles,
    onnx_out: str | os.PathLike[str],
    *,
    mode: str = MERGED,
    weights: Sequence[float] | None = None,
    base: str | os.PathLike[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    partial: bool = False,
    opset: int | None = None,
    inline: bool = False,
    defaults: str = DEFAULTS[0],
    allow_base_mismatch: bool = False,
    allow_links: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Puts adapters into an ONNX file that other tools made; several add up.

    Each layer's weight is found by its name, by the scope or name of the node that uses it, by the
    bias added after it, or by its content, known from a bound bundle (or `base`); never by shape.
    A weight that other nodes use too is changed for the adapter's layers only. Functions that hold
    weights are expanded; the rest stay. Weights in external data stay on disk: memory
    holds two at a time.

    Args:
        onnx_in: an .onnx file of any opset and IR version (unmerged: opset 13 or newer; with
            quantised weights, swappable and bank: 16 or newer, see `opset`).
        bundles: one adapter, several that add up, or a mapping from name to adapter; each a
            `Bundle`, or the path of a bundle file or of a PEFT adapter directory.
        onnx_out: the file to write; external data goes to `onnx_out` + ".data".
        mode: "merged", "unmerged", "swappable", "paired" or "bank"; README describes each. A
            quantised weight is not changed: the adapter becomes a float branch next to it (not in
            modes merged and paired). Run int8 files with the session option
            `session.x64quantprecision` = "1", as `AdapterSession` does: without it, ONNX Runtime's
            int8 sums saturate on x86-64 CPUs that lack VNNI.
        weights: one factor per bundle, by which its change counts; 1 by default.
        base: the checkpoint that the graph was made from: binds unbound bundles, and finds
            weights by content.
        mapping: layer -> initializer, or `initializer[start:stop]` (outputs) in a packed weight,
            or `first+second` where the graph has the layer in parts; for layers that are not found
            otherwise. Of a quantised weight, its integers.
        partial: leave out layers and saved tensors that the graph does not have, as where encoder
            and decoder are two files; a note lists them.
        opset: convert the graph to this opset first, with onnx.version_converter.
        inline: leave no model-local functions, also none of the input's own: a graph of standard
            operators only, for tools that read no functions.
        defaults: what counts in swappable and paired files where no adapter is fed: "bundle" (this
            adapter), "base" (none) or "required" (an adapter must be fed).
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

    Example:
        >>> import fourierft_export as ff, tempfile, torch
        >>> model, folder = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), tempfile.mkdtemp()
        >>> onnx_in, onnx_out = folder + "/base.onnx", folder + "/adapted.onnx"
        >>> _ = torch.onnx.export(model, (torch.ones(2, 8),), onnx_in, verbose=False)
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> bundle = ff.capture(ff.inject(model, config))
        >>> ff.apply_onnx(onnx_in, bundle, onnx_out).layers
        ('0',)
    """
    named = named_bundles(bundles)
    factors = checked_weights(weights, len(named))
    check_mode(mode, defaults)
    mapping = mapping or {}
    _check_mapping(named, mapping)
    inputs = (onnx_in, base, *bundle_sources(bundles))
    paired = mode == PAIRED
    check_model_output(onnx_out, paired=paired, force=force, inputs=inputs)
    source = open_onnx(onnx_in, allow_links=allow_links)
    inputs = (*inputs, *source.files)
    check_model_output(onnx_out, paired=paired, force=force, inputs=inputs)
    if opset is not None:
        source = _convert(source, opset)
    _check_source(source, mode)
    opened = None if base is None else open_base(base)
    bound = {
        name: bundle if opened is None or bundle.is_bound else bundle.bind(opened)
        for name, bundle in named.items()
    }
    if progress:
        progress("find weights", 0, 1)
    wanted = _wanted_layers(bound, opened)
    beside = mode in (SWAPPABLE, BANK)
    expanded = expand_functions(source, products=beside)
    finder = Finder(source)
    joined = join_parts(finder, wanted, mapping)
    if joined:
        finder = Finder(source)
        mapping = {layer: text for layer, text in mapping.items() if layer not in joined}
    found = finder.find(wanted, mapping)
    sites = found.sites
    absent: list[str] = []
    if partial and sites:
        lost = {*found.missing, *missing_saved(finder, found.bridge, bound)}
        absent = sorted(lost)
        bound = {name: without(bundle, lost) for name, bundle in bound.items()}
    fits = _fits(source, found, wanted, bound)
    check_fits(
        source.path,
        fits,
        allow_base_mismatch=allow_base_mismatch,
        remedy=("" if opened else "give the base checkpoint (--base), or ")
        + "say where a weight is (--map LAYER=INITIALIZER)"
        if found.missing
        else "give the model of the base that the adapter belongs to",
    )
    notes = [note for fit in fits for note in fit.notes]
    if joined:
        notes.append(f"parts of layers that the graph has apart are joined: {', '.join(joined)}")
    if expanded:
        notes.append(f"functions that hold weights are expanded: {', '.join(expanded)}")
    if absent:
        listed = ", ".join(compress(absent))
        notes.append(
            f"{len(absent)} layers or tensors that this graph lacks are left out: {listed}"
        )
    floats = [one for several in sites.values() for one in several if not one.quantised]
    shared = sorted({site.name for site in floats if site.shared})
    notes += [f"{name} is used elsewhere, too: that use keeps the base's weight" for name in shared]
    saved = {name for bundle in bound.values() for name in bundle.saved}
    heads = float_heads(source, finder.linears, saved, found.bridge)
    if heads:
        finder = Finder(source)
        listed = ", ".join(one.weight for one in heads)
        notes.append(f"{listed}: quantised in the input, and float here to take the adapter's own")
    quantised = {layer: each for layer, each in sites.items() if each[0].quantised}
    if quantised:
        _check_quantised(source, mode, quantised)
        notes.append(
            f"{len(quantised)} layers are quantised: the adapter is a float branch next to each"
        )
        kinds = {
            one.quantised and one.quantised.kind for each in quantised.values() for one in each
        }
        if mode == BANK and "MatMulInteger" in kinds:
            notes.append(
                "the input quantises its activations with one range for the whole batch: a row "
                "changes a little with the rows that it shares a batch with, as in the base"
            )
    bound = {n: replace(b, spec=f.spec) for (n, b), f in zip(bound.items(), fits, strict=True)}
    places = find_saved(finder, found.bridge, bound)
    if mode == BANK:
        batch_of(source.model)
    if quantised or beside:
        fill_shapes(source.model)
    saved_places = {name: [place] for name, place in places.items()}
    plan = Plan(source, weighted(bound, factors), sites, saved_places, named, defaults)
    expander = write_adapters(plan, mode).expander
    for model in (source.model, expander) if inline else ():
        if model is not None:
            inline_functions(model, source.path)
    files = write_model(source, onnx_out, expander, force=force, progress=progress)
    return report_on(files, source.model, mode, tuple(sites), tuple(named), tuple(notes))


def _convert(source: Source, opset: int) -> Source:
    """The same graph in a newer opset; weights in external data stay where they are."""
    import onnx
    import onnx_ir as ir

    newest = onnx.defs.onnx_opset_version()
    if not source.opset <= opset <= newest:
        raise UsageError(
            source.path, expected=f"an opset from {source.opset} to {newest}", found=str(opset)
        )
    if opset == source.opset:
        return source
    inline_functions(source.model, source.path)  # the converter would drop them
    proto = ir.serde.serialize_model(source.model)
    try:
        proto = onnx.version_converter.convert_version(proto, opset)
        model = ir.serde.deserialize_model(proto)
    except (
        *(RuntimeError, ValueError, ir.serde.SerdeError),
        *(onnx.version_converter.ConvertError, onnx.shape_inference.InferenceError),
    ) as error:
        raise UsageError(
            source.path,
            expected=f"a graph that onnx.version_converter brings to opset {opset}",
            found=first_line(error),
            remedy="export the base at a newer opset",
        ) from None
    version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = max(model.ir_version or 0, version)
    return replace(source, model=model)


def _wanted_layers(bundles: Mapping[str, Bundle], base: Base | None) -> list[Wanted]:
    """Every layer once, with its shape and fingerprint in the base, or else in a bundle."""
    wanted: dict[str, Wanted] = {}
    for bundle in bundles.values():
        for layer in bundle.layers:
            if layer.name not in wanted or layer.fingerprint is not None:
                wanted[layer.name] = Wanted(
                    layer.name, layer.shape, layer.fan_in_fan_out, layer.fingerprint
                )
    if base is not None:
        for name, there in base.layers(wanted).items():
            own = fingerprint(base.weight(name))
            wanted[name] = Wanted(name, there.shape, there.transposed, own)
    return list(wanted.values())


def _check_mapping(bundles: Mapping[str, Bundle], mapping: Mapping[str, str]) -> None:
    layers = {layer.name for bundle in bundles.values() for layer in bundle.layers}
    unknown = sorted(mapping.keys() - layers)
    if unknown:
        raise UsageError(
            "mapping",
            expected="layers of the adapter",
            found=", ".join(unknown[:3]),
            remedy="see the adapter's layers with: fourierft-export inspect BUNDLE",
        )


def _check_opset(source: Source, needed: int, what: str) -> None:
    if source.opset < needed:
        raise UsageError(
            source.path,
            expected=f"opset {needed} or newer for {what}",
            found=f"opset {source.opset}",
            remedy="convert it with --opset 18 (opset=18), which calls onnx.version_converter",
        )


def _check_source(source: Source, mode: str) -> None:
    needed = {UNMERGED: 13, SWAPPABLE: _SIDE_OPSET, BANK: _SIDE_OPSET}.get(mode, 0)
    _check_opset(source, needed, f"mode {mode}")
    text = source.model.metadata_props.get(KEY)
    if text is not None and '"mode":"merged"' not in text:
        raise UsageError(
            source.path,
            expected="a model without unmerged adapters",
            found="one that this package wrote with adapters in it",
            remedy="apply all bundles together to the base's model",
        )


def _check_quantised(source: Source, mode: str, quantised: Mapping[str, Sequence[Site]]) -> None:
    if mode in (MERGED, PAIRED):
        raise BaseMismatchError(
            source.path,
            expected="float weights to merge into",
            found=f"{len(quantised)} quantised ones: quantising W + delta_W again would lose most "
            "of the adapter",
            remedy="use --mode unmerged, swappable or bank, which add a float branch next to them",
            offenders=[f"{layer}: {each[0].describe()}" for layer, each in quantised.items()],
        )
    _check_opset(source, _SIDE_OPSET, "an adapter on quantised weights")


def _fits(
    source: Source, found: Found, wanted: Sequence[Wanted], bundles: Mapping[str, Bundle]
) -> list[Fit]:
    """Whether each adapter belongs to the layers that were found."""
    known = {want.name: want for want in wanted}
    fits = []
    for name, bundle in bundles.items():
        layers: dict[str, FoundLayer | str] = {}
        for layer in bundle.layers:
            sites = found.sites.get(layer.name)
            if sites is None:
                layers[layer.name] = found.missing[layer.name]
            else:
                want = replace(known[layer.name], transposed=layer.fan_in_fan_out)
                compare = _comparing(source, sites, known[layer.name], want)
                held = sites[0].describe() if sites[0].quantised else sites[0].name
                layers[layer.name] = FoundLayer(sites[0].shape, compare=compare, name=held)
        title = f"adapter {name}" if len(bundles) > 1 else "the adapter"
        fits.append(fit_adapter(bundle.spec, layers, name=title))
    return fits


def _comparing(
    source: Source, sites: Sequence[Site], looked_for: Wanted, want: Wanted
) -> Callable[[Fingerprint], LayerVerdict]:
    """A function that judges a layer's sites by a fingerprint; that of the search is known."""

    def compare(expected: Fingerprint) -> LayerVerdict:
        one = replace(want, fingerprint=expected)
        verdicts = {
            site.verdict if one == looked_for else compare_site(source, site, one) for site in sites
        }
        if "different" in verdicts:
            return "different"
        if None in verdicts:
            return "unchecked"
        # Quantised weights fit within a step: that is no other precision of the base.
        precision = "precision" in verdicts and not sites[0].quantised
        return "precision" if precision else "same"

    return compare
