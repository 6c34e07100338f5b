"""From a torch model with adapters to an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ... import __version__
from ...adapt.attach import capture
from ...adapt.layer import FourierLinear
from ...adapt.linear import check_mergeable, stored_weight, to_array
from ...adapt.plain import swapped_layers, with_weight
from ...adapt.tree import active_adapters, fourier_layers
from ...bundle.file import Bundle
from ...errors import UsageError
from ...files.staging import check_output
from ...spectral.delta import Term
from ...types import Progress
from ..bundle_record import record_bundles
from ..graph.inline import inline_functions
from ..graph.write import data_path, write_model
from ..locate.marks import locate_marks
from ..metadata import describe
from ..mode_names import DEFAULTS, MERGED, MODES, RUNTIME_MODES
from ..modes.rewrite import AdaptedLayer, LayerTerm, write_merged, write_unmerged
from ..report import ExportReport, fed_shapes, value_shapes
from ..runtime_paths import expander_path
from .runtime_export import build_runtime, runtime_layers
from .trace import Inputs, trace
from .versions import check_ir_version, check_opset, set_ir_version

_DTYPES = ("float32", "float16", "bfloat16")


def export_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    mode: str = MERGED,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    ir_version: int | None = None,
    inline: bool = False,
    external_data: bool | None = None,
    bundles: Mapping[str, Bundle] | None = None,
    defaults: str = DEFAULTS[0],
    absent: Container[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a model with its active adapters; several add up.

    The graph is that of the bare base, whose adapted weights are then replaced: by W + delta_W
    (merged), or by W plus a delta_W that the graph rebuilds from the initializers `LAYER.spectrum`,
    `.entries` and `.scaling` (unmerged; `LAYER.ADAPTER.spectrum` and so on for several adapters).
    Layers with equal entries share one `.entries` initializer, under the first one's name.

    Args:
        model: a module with `FourierLinear` layers; it is as it was afterwards.
        example_inputs: one tensor, positional arguments, or keyword arguments by name.
        path: the file to write.
        mode: "merged", "unmerged", "swappable", "paired" (with PATH.expand.onnx beside) or "bank".
        input_names: names of the graph's inputs; by default the arguments' own.
        output_names: names of the outputs; by default the keys of a dictionary or ModelOutput,
            else "output", or "output_0", "output_1", ...
        dynamic_shapes: as torch.onnx.export takes them, such as {"x": {0: "batch"}}; sizes are
            fixed to the example's by default.
        opset: of the standard operators, 18 to 25; torch's default if not given.
        ir_version: of the file format; by default 10, or more where the opset needs it.
        inline: leave no model-local functions: a graph of standard operators only, which other
            tools (float16 and version converters) can change.
        external_data: True writes weights to `path` + ".data", False never does; by default only
            where the model would pass protobuf's 2 GiB.
        defaults: in the modes whose adapter is an input, what counts when it is not fed: "bundle"
            (the adapter on the model), "base", or "required" (it must be fed; onnxruntime-node
            ignores what is fed to inputs that have a default).
        absent: in those modes, names of saved tensors that the base lacks, so that what the model
            has under the adapter is random (a new head): every adapter must bring them, and without
            an adapter they are zeros.
        bundles: adapter name -> the bundle it came from, whose hash is written into the file; by
            default that of the adapter as `capture` gives it.
        force: replace an existing file.
        progress: called with (what, done, total).

    Returns:
        What was written.

    Raises:
        UsageError: unknown mode, no active adapter, an unsuitable opset, IR version or dtype, an
            output that exists, or a model that torch.onnx cannot export.
        BadInputError: an adapted layer's weight is not in the graph.
        BaseMismatchError: an adapter of a bank lacks tensors of `absent`.
        FileAccessError: the file cannot be written.
    """
    report = progress or _silent
    if mode in RUNTIME_MODES:
        layers = runtime_layers(model, mode)
    else:
        layers = {p: layer for p, layer in fourier_layers(model).items() if layer.active}
    _check(model, mode, layers, defaults)
    check_opset(opset)
    check_ir_version(ir_version, opset, functions=mode != MERGED and not inline)
    check_output(path, force=force)
    if mode in RUNTIME_MODES:
        report("trace", 0, 3)
        built = build_runtime(
            model,
            example_inputs,
            mode,
            defaults=defaults,
            bundles=bundles,
            absent=absent,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            opset=opset,
        )
        report("save", 2, 3)
        done = _save(
            built.model,
            path,
            mode,
            built.layers,
            built.adapters,
            (),
            beside=built.expander,
            inline=inline,
            ir_version=ir_version,
            external_data=external_data,
            force=force,
        )
        report("save", 3, 3)
        return done
    adapters = {name: capture(model, name) for name in active_adapters(model)}
    report("trace", 0, 3)
    marks = _marks(layers)

    def stand_in(path: str, layer: FourierLinear) -> nn.Module:
        return with_weight(layer.linear, marks[path]) if path in marks else layer.linear

    with swapped_layers(model, stand_in):
        graph = trace(
            model,
            example_inputs,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            opset=opset,
        )
    report("write adapters", 1, 3)
    sites = locate_marks(graph, {path: to_array(mark) for path, mark in marks.items()})
    content = {path: _adapted(layer) for path, layer in layers.items()}
    if mode == MERGED:
        written = write_merged(sites, content)
    else:
        written = write_unmerged(graph, sites, content)
    graph.metadata_props.update(
        describe(
            version=__version__,
            mode=mode,
            adapters=adapters,
            sources=bundles or {},
            written=written,
        )
    )
    if mode != MERGED:
        record_bundles(graph, adapters | dict(bundles or {}))
    report("save", 2, 3)
    done = _save(
        graph,
        path,
        mode,
        tuple(layers),
        tuple(adapters),
        _notes(content, mode),
        inline=inline,
        ir_version=ir_version,
        external_data=external_data,
        force=force,
    )
    report("save", 3, 3)
    return done


def _save(
    graph: ir.Model,
    path: str | os.PathLike[str],
    mode: str,
    layers: tuple[str, ...],
    adapters: tuple[str, ...],
    notes: tuple[str, ...],
    *,
    beside: ir.Model | None = None,
    inline: bool,
    ir_version: int | None,
    external_data: bool | None,
    force: bool,
) -> ExportReport:
    """Write the graph, and the expander beside a paired one, which comes first."""
    if beside is not None:
        check_output(expander_path(path), force=force)
    files: list[Path] = []
    for one, to in ((beside, expander_path(path)), (graph, path)):
        if one is not None:
            if inline:
                inline_functions(one)
            set_ir_version(one, ir_version)
            files = [*write_model(one, to, external_data=external_data, force=force), *files]
    data = data_path(files[0])
    return ExportReport(
        path=str(files[0]),
        data=str(data) if data in files else None,
        bytes=sum(file.stat().st_size for file in files),
        mode=mode,
        opset=graph.opset_imports[""],
        nodes=len(graph.graph),
        inputs=fed_shapes(graph.graph),
        outputs=value_shapes(graph.graph.outputs),
        layers=layers,
        adapters=adapters,
        notes=notes,
    )


def _check(model: nn.Module, mode: str, layers: Mapping[str, FourierLinear], defaults: str) -> None:
    if defaults not in DEFAULTS:
        raise UsageError("defaults", expected=" or ".join(DEFAULTS), found=repr(defaults))
    if mode not in MODES:
        raise UsageError("export mode", expected=" or ".join(MODES), found=repr(mode))
    if not layers:
        raise UsageError(
            f"export of {type(model).__name__}",
            expected="a model with an active adapter",
            found="none",
            remedy="attach a bundle first, or export the base with torch.onnx.export",
        )
    check_mergeable(f"export of {type(model).__name__}", {p: m.linear for p, m in layers.items()})
    wrong = [
        f"{path}: {weight.dtype}"
        for path, layer in layers.items()
        if str((weight := stored_weight(layer.linear)).dtype).removeprefix("torch.") not in _DTYPES
    ]
    if wrong:
        raise UsageError(
            f"export of {type(model).__name__}",
            expected=f"adapted weights of dtype {', '.join(_DTYPES)}",
            found=f"{len(wrong)} of another",
            remedy="convert the model first, with model.float()",
            offenders=wrong,
        )


def _marks(layers: Mapping[str, FourierLinear]) -> dict[str, torch.Tensor]:
    """Path -> random numbers in the shape and dtype of the layer's weight (see `locate`)."""
    random = torch.Generator().manual_seed(0)
    weights = {path: stored_weight(layer.linear) for path, layer in layers.items()}
    return {p: torch.randn(w.shape, generator=random).to(w) for p, w in weights.items()}


def _adapted(layer: FourierLinear) -> AdaptedLayer:
    terms = []
    for name in layer.active:
        adapter = layer.adapter(name)
        spectrum = to_array(adapter.spectrum)
        scaling = float(adapter.origin.scaling)
        terms.append(LayerTerm(name, Term(spectrum, adapter.host_entries, scaling)))
    return AdaptedLayer(to_array(stored_weight(layer.linear)), layer.fan_in_fan_out, tuple(terms))


def _notes(layers: Mapping[str, AdaptedLayer], mode: str) -> tuple[str, ...]:
    dtypes = {t.term.spectrum.dtype.name for layer in layers.values() for t in layer.terms}
    if mode != MERGED and "bfloat16" in dtypes:
        return ("bfloat16 spectra are stored as float32, which holds every such value exactly",)
    return ()


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""
