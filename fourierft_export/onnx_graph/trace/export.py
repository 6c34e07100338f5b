"""From a torch model with adapters to an ONNX file: trace the base, then what `apply_onnx` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...adapt.attach import capture
from ...adapt.base_linear import check_mergeable, stored_weight, to_tensor
from ...adapt.modules import active_adapters, adapter_names, without_adapters
from ...bundle.bundle import Bundle
from ...errors import UsageError
from ...types import Progress
from ..graph.inline import inline_functions
from ..graph.write import check_model_output, write_model
from ..mode_names import BANK, DEFAULTS, MERGED, PAIRED, RUNTIME_MODES
from ..modes.merged import saved_values
from ..modes.mode_records import Plan
from ..modes.write_mode import check_adapter_count, check_mode, write_adapters
from ..report import ExportReport, report_on
from .base import replaced_tensors, tensor_of, trace_base
from .trace import Inputs, check_versions, set_ir_version

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    """Exports a model with its active adapters to ONNX; several add up.

    The graph is that of the bare base, whose adapted weights are then replaced: by W + delta_W
    (merged), or by W plus a delta_W that the graph rebuilds from the initializers `LAYER.spectrum`,
    `.entries` and `.scaling` (unmerged; `LAYER.ADAPTER.spectrum` and so on for several adapters).
    Layers with equal entries share one `.entries` initializer, under the first one's name.

    Args:
        model: a module with `FourierLinear` layers; it is as it was afterwards.
        example_inputs: one tensor, positional arguments, or keyword arguments by name.
        path: the file to write.
        mode: "merged", "unmerged", "swappable", "paired" (with a second file,
            PATH.expand.onnx) or "bank".
        input_names: names of the graph's inputs; by default the arguments' own.
        output_names: names of the outputs; by default the keys of a dictionary or ModelOutput
            (KEY.INNER for outputs within outputs), else "output", or "output_0", "output_1", ...
            Such keys choose these outputs, in this order; other names rename all of them.
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
            has under the adapter is random (a new head): every adapter must contain them, and
            without an adapter they are zeros.
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

    Example:
        >>> import fourierft_export as ff, tempfile, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), config)
        >>> path = tempfile.mkdtemp() + "/model.onnx"
        >>> report = ff.export_onnx(model, torch.ones(2, 8), path, mode="unmerged")
        >>> report.mode, report.layers
        ('unmerged', ('0',))
    """
    check_mode(mode, defaults)
    names = adapter_names(model) if mode == BANK else active_adapters(model)
    check_adapter_count(mode, names)
    check_versions(opset, ir_version, functions=mode != MERGED and not inline)
    check_model_output(path, paired=mode == PAIRED, force=force)
    adapters = {name: capture(model, name) for name in names}
    output = Output(path, mode, defaults, absent, inline, ir_version, external_data, force)
    tracing = {"input_names": input_names, "output_names": output_names, "opset": opset}
    tracing["dynamic_shapes"] = dynamic_shapes
    with without_adapters(model):
        return export_adapters(
            model, example_inputs, adapters, bundles or {}, output, progress, **tracing
        )


@dataclass(frozen=True)
class Output:
    """What to write and where: mostly arguments of `export_onnx` of the same names."""

    path: str | os.PathLike[str]
    mode: str
    defaults: str
    absent: Container[str]
    inline: bool
    ir_version: int | None
    external_data: bool | None
    force: bool
    write_more: Callable[[Path], None] | None = None  # as `write_model` takes it


def export_adapters(
    model: nn.Module,
    example_inputs: Inputs,
    adapters: Mapping[str, Bundle],
    sources: Mapping[str, Bundle],
    output: Output,
    progress: Progress | None,
    **tracing: Any,
) -> ExportReport:
    """Export a model without adapters, and put adapters into the graph.

    Args:
        model: without adapters.
        example_inputs: a tuple of positional arguments, or a mapping of keyword arguments.
        progress: called with (what, done, total).
        adapters: adapter name -> bundle, bound, with the model's names.
        sources: adapter name -> the bundle as it was given.
        output, tracing: what to write, and the options of `trace`.
    """
    path, mode, absent = output.path, output.mode, output.absent
    report = progress or (lambda _what, _done, _total: None)
    report("trace", 0, 3)
    adapted = {name for one in adapters.values() for name in one.spectra}
    layers = tuple(path for path, _ in model.named_modules() if path in adapted)
    _check_layers(model, layers)
    values, saved = {}, []
    if mode in RUNTIME_MODES:
        names = sorted({name for one in adapters.values() for name in one.saved})
        saved = [name for name in names if tensor_of(model, name).is_floating_point()]
    else:
        for name, array in saved_values(adapters).items():
            values[name] = to_tensor(array).to(tensor_of(model, name))
    with replaced_tensors(model, values):
        source, sites, places = trace_base(
            model, example_inputs, layers, saved, absent=absent, **tracing
        )
    report("write adapters", 1, 3)
    plan = Plan(source, adapters, sites, places, sources, output.defaults, absent)
    written = write_adapters(plan, mode)
    report("save", 2, 3)
    graph = source.model
    for one in (graph, written.expander):
        if one is not None:
            if output.inline:
                inline_functions(one, path)
            set_ir_version(one, output.ir_version)
    files = write_model(
        graph,
        path,
        written.expander,
        external_data=output.external_data,
        force=output.force,
        write_more=output.write_more,
    )
    report("save", 3, 3)
    dtypes = {array.dtype.name for one in adapters.values() for array in one.spectra.values()}
    notes: tuple[str, ...] = ()
    if mode != MERGED and "bfloat16" in dtypes:
        notes = ("bfloat16 spectra are stored as float32, which holds every such value exactly",)
    return report_on(files, graph, mode, layers, tuple(adapters), notes)


def _check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Refuse a model without adapted layers, or with weights that a graph cannot change."""
    where = f"export of {type(model).__name__}"
    if not layers:
        raise UsageError(
            where,
            expected="a model with an active adapter",
            found="none",
            remedy="attach a bundle first, or export the base with torch.onnx.export",
        )
    modules = {path: model.get_submodule(path) for path in layers}
    check_mergeable(where, modules)
    dtypes = {path: stored_weight(module).dtype for path, module in modules.items()}
    wrong = [f"{path}: {dtype}" for path, dtype in dtypes.items() if dtype not in _DTYPES]
    if wrong:
        raise UsageError(
            where,
            expected="adapted weights of dtype float32, float16 or bfloat16",
            found=f"{len(wrong)} of another",
            remedy="convert the model first, with model.float()",
            offenders=wrong,
        )
