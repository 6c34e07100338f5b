"""Trains, packs, merges, exports and validates FourierFT adapters.

Public names are imported on first use, so that `import fourierft_export`, `--help` and `inspect` do
not import torch, onnx or transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fourierft_export import errors

if TYPE_CHECKING:
    from fourierft_export.adapt.active import activate, disabled, trainable_parameters
    from fourierft_export.adapt.attach import attach, capture, combine, detach, replace
    from fourierft_export.adapt.config import FourierFTConfig
    from fourierft_export.adapt.fourier_linear import FourierLinear
    from fourierft_export.adapt.fuse import fuse, restore, unload
    from fourierft_export.adapt.inject import inject
    from fourierft_export.adapt.modules import active_adapters, adapter_names
    from fourierft_export.adapt.routing.route import route
    from fourierft_export.bundle.bundle import Bundle
    from fourierft_export.bundle.paper import from_paper
    from fourierft_export.bundle.peft import from_peft, to_peft
    from fourierft_export.bundle.pool import Pool
    from fourierft_export.bundle.push import push
    from fourierft_export.bundle.to_lora import to_lora
    from fourierft_export.merge.manifest import verify_merged
    from fourierft_export.merge.merge import merge_checkpoint
    from fourierft_export.onnx_graph.apply import apply_onnx
    from fourierft_export.onnx_graph.runtime.session import AdapterSession
    from fourierft_export.onnx_graph.trace.export import export_onnx
    from fourierft_export.onnx_graph.trace.pretrained import export_pretrained
    from fourierft_export.proof.validate import validate
    from fourierft_export.recover.from_checkpoint import recover_bundle
    from fourierft_export.recover.from_onnx import recover_onnx
    from fourierft_export.train.callback import BundleCallback, save_bundles
    from fourierft_export.train.parameter_groups import parameter_groups
    from fourierft_export.train.settings import TrainSettings
    from fourierft_export.train.suggest import suggest
    from fourierft_export.train.task import TrainingTask
    from fourierft_export.train.train import train_adapter

__version__ = "0.2.0"

__all__ = [
    "AdapterSession",
    "Bundle",
    "BundleCallback",
    "FourierFTConfig",
    "FourierLinear",
    "Pool",
    "TrainSettings",
    "TrainingTask",
    "activate",
    "active_adapters",
    "adapter_names",
    "apply_onnx",
    "attach",
    "capture",
    "combine",
    "detach",
    "disabled",
    "errors",
    "export_onnx",
    "export_pretrained",
    "from_paper",
    "from_peft",
    "fuse",
    "inject",
    "merge_checkpoint",
    "parameter_groups",
    "push",
    "recover_bundle",
    "recover_onnx",
    "replace",
    "restore",
    "route",
    "save_bundles",
    "suggest",
    "to_lora",
    "to_peft",
    "train_adapter",
    "trainable_parameters",
    "unload",
    "validate",
    "verify_merged",
]

_HOMES = {
    "AdapterSession": "onnx_graph.runtime.session",
    "Bundle": "bundle.bundle",
    "BundleCallback": "train.callback",
    "FourierFTConfig": "adapt.config",
    "FourierLinear": "adapt.fourier_linear",
    "Pool": "bundle.pool",
    "TrainSettings": "train.settings",
    "TrainingTask": "train.task",
    "activate": "adapt.active",
    "active_adapters": "adapt.modules",
    "adapter_names": "adapt.modules",
    "apply_onnx": "onnx_graph.apply",
    "attach": "adapt.attach",
    "capture": "adapt.attach",
    "combine": "adapt.attach",
    "detach": "adapt.attach",
    "disabled": "adapt.active",
    "export_onnx": "onnx_graph.trace.export",
    "export_pretrained": "onnx_graph.trace.pretrained",
    "from_paper": "bundle.paper",
    "from_peft": "bundle.peft",
    "fuse": "adapt.fuse",
    "inject": "adapt.inject",
    "merge_checkpoint": "merge.merge",
    "parameter_groups": "train.parameter_groups",
    "push": "bundle.push",
    "recover_bundle": "recover.from_checkpoint",
    "recover_onnx": "recover.from_onnx",
    "replace": "adapt.attach",
    "restore": "adapt.fuse",
    "route": "adapt.routing.route",
    "save_bundles": "train.callback",
    "suggest": "train.suggest",
    "to_lora": "bundle.to_lora",
    "to_peft": "bundle.peft",
    "train_adapter": "train.train",
    "trainable_parameters": "adapt.active",
    "unload": "adapt.fuse",
    "validate": "proof.validate",
    "verify_merged": "merge.manifest",
}


def __getattr__(name: str) -> object:
    """Imports a public name on first use (PEP 562).

    Raises:
        AttributeError: no such name.
        MissingExtraError: the name needs a package that is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        missing = errors.extra_of(error, f"{__name__}.{name}")
        if missing is None:
            raise
        raise missing from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
