"""From a Hugging Face directory and bundles to an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...adapt.active import activate
from ...adapt.attach import attach
from ...adapt.saved import own_state
from ...adapt.tree import adapted_modules, fourier_layers
from ...bundle.combine import checked_weights
from ...bundle.file import Bundle
from ...bundle.fit import check_fits, fit_adapter, layers_of_base
from ...errors import UsageError
from ...files.staging import check_output
from ...models.base import Base, open_base
from ...models.examples import dynamic_axes, example_inputs, output_names
from ...models.load import load_model
from ...models.task import choose_task, get_task, head_labels
from ...types import Progress
from ..mode_names import BANK, DEFAULTS, MERGED, RUNTIME_MODES
from ..report import ExportReport
from ..several import Bundles, named_bundles, weighted
from .cache import CachedModel
from .encoder import EncoderView
from .export import export_onnx

if TYPE_CHECKING:
    from torch import nn


def export_pretrained(
    base: str | os.PathLike[str],
    bundles: Bundles,
    path: str | os.PathLike[str],
    *,
    mode: str = MERGED,
    weights: Sequence[float] | None = None,
    task: str | None = None,
    cache: bool = False,
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
    """Export a transformers model with its adapters: dynamic batch and sequence, usual names.

    Inputs are input_ids, attention_mask and, where the model tells token types apart,
    token_type_ids; or pixel_values (image-classification). Outputs are logits; start_logits and
    end_logits (question-answering); or last_hidden_state (seq2seq-encoder), with pooler_output
    (feature-extraction).

    Args:
        base: a Hugging Face model directory.
        bundles: one adapter, several that add up, or several by name.
        path: the file to write.
        mode: one of `export_onnx`'s. A bank holds a row per bundle, swappable and paired take one.
        weights: one factor per bundle, by which its change counts; 1 by default.
        task: one of `models.task.TASKS`; by default from the adapter's task type, else from the
            base's architecture.
        cache: of a causal model (see `CachedModel`): inputs past_key_values.N.key and .value and
            position_ids, outputs present.N.key and .value.
        dtype: name of the torch dtype to export in, weights and computation; None keeps the
            checkpoint's. delta_W is float32 and the sum is rounded once.
        opset, ir_version, inline, external_data, defaults, force, progress: as in `export_onnx`.
        allow_base_mismatch: accept base weights other than those the adapter was trained on.

    Returns:
        What was written.

    Raises:
        UsageError, BadInputError, FileAccessError: as in `export_onnx` and `load_model`.
        BaseMismatchError: the adapter does not belong to the base, or the base lacks weights.
    """
    named = named_bundles(bundles)
    factors = checked_weights(weights, len(named))
    opened = open_base(base)
    check_output(path, force=force, inputs=(opened.directory,))
    # Against the files: a loaded model may be in another precision than they are.
    fits = []
    for number, (name, bundle) in enumerate(named.items(), 1):
        found = layers_of_base(opened, [layer.name for layer in bundle.layers])
        fits.append(fit_adapter(bundle.spec, found, name=f"adapter {name}"))
        if progress:
            progress("checking the base", number, len(named))
    check_fits(opened.directory, fits, allow_base_mismatch=allow_base_mismatch)
    task = choose_task(task, opened.config, _task_type(named)).name
    if cache and task != "text-generation":
        raise UsageError(
            "export with a key-value cache",
            expected="the task text-generation",
            found=task,
        )
    if progress:
        progress("load", 0, 1)
    model = load_model(
        base,
        task,
        num_labels=head_labels(_saved_shapes(named)),
        dtype=dtype,
        provided={name for bundle in named.values() for name in bundle.saved},
    )
    if progress:
        progress("load", 1, 1)
    attach_all(model, weighted(named, factors), allow_base_mismatch=True, active=mode != BANK)
    absent = _absent(model, opened, named) if mode in RUNTIME_MODES else ()
    traced = _to_trace(model, task, cache)
    report = export_onnx(
        traced.model,
        traced.inputs,
        path,
        mode=mode,
        input_names=traced.input_names,
        output_names=traced.output_names,
        dynamic_shapes=traced.axes,
        opset=opset,
        ir_version=ir_version,
        inline=inline,
        external_data=external_data,
        bundles=named,
        defaults=defaults,
        absent=absent,
        force=force,
        progress=progress,
    )
    notes = [note for fit in fits for note in fit.notes]
    if absent:
        notes.append(
            f"the base has no {', '.join(absent)}: every adapter must bring its own; without an "
            "adapter (None, or row 0 of a bank) they are zeros, and so is what they give"
        )
    outside = len(fourier_layers(model)) - len(report.layers)
    if outside:
        notes.append(f"{outside} adapted layers are outside the encoder, and not in the graph")
    return replace(report, notes=(*notes, *report.notes))


@dataclass(frozen=True)
class _Traced:
    """What `export_onnx` gets."""

    model: nn.Module
    inputs: Mapping[str, Any]
    input_names: list[str] | None
    output_names: list[str]
    axes: Mapping[str, Any]


def _to_trace(model: nn.Module, task: str, cache: bool) -> _Traced:
    if cache:
        cached = CachedModel(model)
        return _Traced(
            cached, cached.example(), cached.input_names(), cached.output_names(), cached.axes()
        )
    inputs = example_inputs(model)
    view = EncoderView(model) if get_task(task).encoder_only else model
    return _Traced(view, inputs, None, output_names(model, task), dynamic_axes(inputs))


def attach_all(
    model: nn.Module,
    bundles: Mapping[str, Bundle],
    *,
    allow_base_mismatch: bool = False,
    active: bool = True,
) -> None:
    """Attach every bundle under its name; make all of them active, or leave the last one so."""
    for name, bundle in bundles.items():
        attach(model, bundle, name, allow_base_mismatch=allow_base_mismatch)
    if active:
        activate(model, tuple(bundles))


def _absent(model: nn.Module, base: Base, bundles: Mapping[str, Bundle]) -> tuple[str, ...]:
    """Saved tensors that the base lacks, as a bare encoder lacks a head.

    What the model has there is random, and must not pass for the base's.
    """
    bridge = base.bridge(layer.name for bundle in bundles.values() for layer in bundle.layers)
    names = (
        f"{path}.{leaf}"
        for path, module in adapted_modules(model).items()
        for leaf in own_state(module.original)
    )
    return tuple(name for name in names if not {name, bridge.to_base(name)} & base.tensors.keys())


def _task_type(bundles: Mapping[str, Bundle]) -> str | None:
    """The adapters' task type, if they agree on one."""
    types = {bundle.spec.task_type for bundle in bundles.values()} - {None}
    return types.pop() if len(types) == 1 else None


def _saved_shapes(bundles: Mapping[str, Bundle]) -> dict[str, tuple[int, ...]]:
    saved: dict[str, Any] = {}
    for bundle in bundles.values():
        saved.update({name: np.shape(array) for name, array in bundle.saved.items()})
    return saved
