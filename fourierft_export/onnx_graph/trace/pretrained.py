"""From a Hugging Face directory and bundles to an ONNX file."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...adapt.base_linear import is_conv1d, is_linear, layer_shape
from ...bundle.bundle import Bundle
from ...bundle.combine import checked_weights
from ...bundle.fit import (
    FoundLayer,
    FoundTensor,
    check_fits,
    fit_adapter,
    fit_by_names,
    layers_of_base,
)
from ...bundle.peft import CONFIG_FILE as ADAPTER_CONFIG
from ...errors import UsageError
from ...files.staging import check_output
from ...models.base_tensors import Base, open_base
from ...models.example_inputs import dynamic_axes, example_inputs
from ...models.load import load_model
from ...models.task import choose_task, get_task, head_labels
from ...types import Progress
from ..adapters import Bundles, bundle_sources, named_bundles, weighted
from ..graph.write import check_model_output
from ..mode_names import DEFAULTS, MERGED, PAIRED, RUNTIME_MODES
from ..modes.write_mode import check_adapter_count, check_mode
from ..report import ExportReport
from .export import Output, export_adapters
from .genai_config import list_genai_files, write_genai_files
from .model_parts import CachedModel, EncoderView
from .trace import check_versions, list_outputs

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


def export_pretrained(
    base: str | os.PathLike[str],
    bundles: Bundles,
    path: str | os.PathLike[str],
    *,
    mode: str = MERGED,
    weights: Sequence[float] | None = None,
    task: str | None = None,
    cache: bool = False,
    genai: bool = False,
    dtype: str | None = "float32",
    opset: int | None = None,
    ir_version: int | None = None,
    inline: bool = False,
    external_data: bool | None = None,
    defaults: str = DEFAULTS[0],
    allow_base_mismatch: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Exports a transformers model with adapters to ONNX, with dynamic batch and sequence.

    Inputs are input_ids, attention_mask and, where the model has token types,
    token_type_ids; or pixel_values (image-classification). Outputs are logits; start_logits and
    end_logits (question-answering); or last_hidden_state (seq2seq-encoder), with pooler_output
    (feature-extraction).

    Args:
        base: a Hugging Face model directory.
        bundles: one adapter, several that add up, or a mapping from name to adapter; each a
            `Bundle`, or the path of a bundle file or of a PEFT adapter directory.
        path: the file to write.
        mode: "merged", "unmerged", "swappable", "paired" or "bank". A bank holds a row per bundle,
            swappable and paired take one.
        weights: one factor per bundle, by which its change counts; 1 by default.
        task: one of `models.task.TASKS`; by default from the adapter's task type, else from the
            base's architecture.
        cache: give a causal model its cache of keys and values: inputs past_key_values.N.key and
            .value and position_ids, outputs present.N.key and .value.
        genai: with the cache, and with what onnxruntime-genai needs in the folder of `path`:
            genai_config.json and the base's tokenizer.
        dtype: name of the torch dtype to export in, weights and computation; None keeps the
            checkpoint's. delta_W is float32 and the sum is rounded once.
        opset: of the standard operators, 18 to 25; torch's default if not given.
        ir_version: of the file format; by default 10, or more where the opset needs it.
        inline: write no model-local functions, for tools that read none.
        external_data: True writes weights to `path` + ".data", False never does; by default only
            where the file would be too large.
        defaults: what counts in swappable and paired files where no adapter is fed: "bundle" (this
            adapter), "base" (none) or "required" (an adapter must be fed).
        force: replace an existing output.
        progress: called with (what, done, total).
        allow_base_mismatch: accept base weights other than those the adapter was trained on.

    Returns:
        What was written.

    Raises:
        UsageError: an unknown mode or task, a model that torch cannot trace, an existing output.
        BadInputError: a damaged file, or weights that overflow their dtype.
        FileAccessError: a file that cannot be read or written.
        BaseMismatchError: the adapter does not belong to the base, or the base lacks weights.
    """
    named = named_bundles(bundles)
    factors = checked_weights(weights, len(named))
    check_mode(mode, defaults)
    check_adapter_count(mode, named)
    opened = open_base(base)
    cache = cache or genai
    read = (opened.directory, *bundle_sources(bundles))
    check_model_output(path, paired=mode == PAIRED, force=force, inputs=read)
    for out in list_genai_files(Path(path).parent, opened.directory) if genai else []:
        check_output(out, force=force, inputs=read)
    check_versions(opset, ir_version, functions=mode != MERGED and not inline)
    if progress:
        progress("checking the base", 0, 1)
    # Against the files: a loaded model may be in another precision than they are.
    fits = [
        fit_adapter(one.spec, layers_of_base(opened, one.spectra), name=f"adapter {name}")
        for name, one in named.items()
    ]
    check_fits(opened.directory, fits, allow_base_mismatch=allow_base_mismatch)
    notes = [note for fit in fits for note in fit.notes]
    if (opened.directory / ADAPTER_CONFIG).is_file():
        notes.append(f"{opened.directory} holds an adapter as well: it is not loaded")
    given = {n: replace(b, spec=f.spec) for (n, b), f in zip(named.items(), fits, strict=True)}
    task = choose_task(task, opened.config, _task_type(named)).name
    if cache and task != "text-generation":
        raise UsageError(
            "export with a key-value cache", expected="the task text-generation", found=task
        )
    if progress:
        progress("load", 0, 1)
    saved = {name: np.shape(array) for one in named.values() for name, array in one.saved.items()}
    model = load_model(base, task, num_labels=head_labels(saved), dtype=dtype, provided=set(saved))
    if progress:
        progress("load", 1, 1)
    traced: nn.Module = EncoderView(model) if get_task(task).encoder_only else model
    there = {path for path, _ in traced.named_modules()}
    adapters = {n: _on_model(model, one, there) for n, one in weighted(given, factors).items()}
    outside = max(len(named[n].spectra) - len(one.spectra) for n, one in adapters.items())
    if outside:
        notes.append(f"{outside} adapted layers are outside the encoder, and not in the graph")
    absent = _absent(opened, adapters) if mode in RUNTIME_MODES else ()
    if absent:
        notes.append(
            f"the base has no {', '.join(absent)}: every adapter must contain its own; without an "
            "adapter (None, or row 0 of a bank) they are zeros, and so is what they give"
        )
    options: dict[str, Any] = {}
    if cache:
        traced = cached = CachedModel(model)
        inputs = cached.example()
        options["input_names"] = cached.input_names()
        options |= {"output_names": cached.output_names(), "dynamic_shapes": cached.axes()}
    else:
        inputs = example_inputs(model)
        options["dynamic_shapes"] = dynamic_axes(inputs)
        options["output_names"] = list_outputs(traced, inputs, get_task(task).outputs)
    output = Output(path, mode, defaults, absent, inline, ir_version, external_data, force)
    if genai:
        name, folder = Path(path).name, opened.directory
        output = replace(output, write_more=lambda to: write_genai_files(to, name, cached, folder))
    report = export_adapters(
        traced, inputs, adapters, named, output, progress, opset=opset, **options
    )
    if genai:
        notes.append(f"onnxruntime-genai runs the folder {Path(path).parent}")
    return replace(report, notes=(*notes, *report.notes))


def _on_model(model: nn.Module, bundle: Bundle, there: Container[str]) -> Bundle:
    """A bundle with the names of a loaded model, of these modules alone; all misfits are listed.

    Tensors of the task model around a bare base, such as its head, are left out.
    """
    modules = dict(model.named_modules())
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    def layer_at(path: str) -> FoundLayer | str:
        module = modules.get(path)
        if module is None or not is_linear(module):
            return "no such linear layer in the model"
        return FoundLayer(layer_shape(module))

    def tensor_at(name: str) -> FoundTensor | None:
        own = state.get(name)
        return own if own is None else FoundTensor(tuple(own.shape), not own.is_floating_point())

    fit, paths, names = fit_by_names(
        bundle.spec, bundle.saved, modules, layer_at, tensor_at, "model"
    )
    check_fits(type(model).__name__, [fit], allow_base_mismatch=None)
    layers = tuple(
        replace(layer, name=path, fan_in_fan_out=is_conv1d(modules[path]))
        for layer in fit.spec.layers
        if (path := paths[layer.name]) in there
    )
    spectra, entries = (
        {paths[name]: array for name, array in held.items() if paths[name] in there}
        for held in (bundle.spectra, bundle.explicit_entries)
    )
    saved = {to: bundle.saved[n] for n, to in names.items() if to.rpartition(".")[0] in there}
    return Bundle(replace(fit.spec, layers=layers), spectra, saved, entries)


def _absent(base: Base, adapters: Mapping[str, Bundle]) -> tuple[str, ...]:
    """Saved tensors that the base lacks, as a bare encoder lacks a head.

    What the model has there is random, and must not pass for the base's.
    """
    bridge = base.bridge(layer.name for one in adapters.values() for layer in one.layers)
    names = dict.fromkeys(name for one in adapters.values() for name in one.saved)
    stored = {name: base.stored_name(bridge.to_base(name)) for name in names}
    return tuple(n for n, there in stored.items() if not {n, there} & base.tensors.keys())


def _task_type(bundles: Mapping[str, Bundle]) -> str | None:
    """The adapters' task type, if they agree on one."""
    types = {bundle.spec.task_type for bundle in bundles.values()} - {None}
    return types.pop() if len(types) == 1 else None
