"""The demo's steps: pre-train a base, train an adapter, ship it, prove what was shipped.

After training every step starts from the files, as a deployment would.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from ..adapt.active import activate
from ..adapt.attach import attach, capture
from ..adapt.config import FourierFTConfig
from ..adapt.inject import inject
from ..bundle.file import Bundle
from ..merge.merge import merge_checkpoint
from ..onnx_graph.trace.export import export_onnx
from ..proof.report import Report
from ..proof.validate import validate
from . import vit
from .digits import SHIFTS, Split, upright
from .learn import Progress, accuracy, predict, train
from .result import ShippedAdapter

BASE = "base"
MODES = ("merged", "unmerged")
ENTRY_SEED = 2024  # the paper's

# Found by experiment. The scaling is PEFT's default; at the paper's for vision transformers, 300,
# the learning rate would be half of it (0.2 to 0.3 there). Zero spectra start from the base itself.
ADAPTER = FourierFTConfig(
    n_frequency=64,
    scaling=150.0,
    random_loc_seed=ENTRY_SEED,
    target_modules=("query", "key", "value", "output", "up", "down"),
    init_weights=True,
)
ADAPTER_LR = 0.15
BASE_LR = 2e-3
BASE_WEIGHT_DECAY = 0.05


class Views(NamedTuple):
    """What a picture shows of one kind of test images: classes (n,) seen before and after."""

    images: Tensor
    before: Tensor
    after: Tensor


def pretrain(data: Split, *, epochs: int, seed: int, progress: Progress) -> vit.DigitViT:
    """A vision transformer that reads these digits; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = vit.DigitViT(vit.ViTConfig())
    train(
        model,
        data,
        upright,
        epochs=epochs,
        lr=BASE_LR,
        weight_decay=BASE_WEIGHT_DECAY,
        seed=seed,
        progress=progress,
    )
    return model


def learn_adapter(
    model: nn.Module, data: Split, name: str, *, epochs: int, seed: int, progress: Progress
) -> Bundle:
    """Train an adapter for the shift `name`; take it out as a bundle. The base stays frozen.

    The adapter stays on the model; it is not active afterwards.
    """
    with torch.random.fork_rng(devices=[]):  # it draws, as PEFT does, even to start from zeros
        inject(model, ADAPTER, name)
    train(
        model,
        data,
        SHIFTS[name],
        epochs=epochs,
        lr=ADAPTER_LR,
        weight_decay=0.0,
        seed=seed,
        progress=progress,
    )
    bundle = capture(model, name)
    activate(model, [])
    return bundle


def ship(folder: Path, bundle_file: str, name: str, test: Split) -> tuple[ShippedAdapter, Views]:
    """Merge a bundle, export it in both modes, and prove all of it on the test images.

    Args:
        folder: holds the base's checkpoint folder and the bundle; the artifacts go there.
        bundle_file: the bundle's file name.
        name: of the adapter.
        test: shifted test images with their labels.

    Returns:
        What was shipped, and what a picture shows of it.

    Raises:
        ValidationError: the artifacts do not agree.
    """
    bundle = Bundle.load(folder / bundle_file)
    base = vit.load(folder / BASE)
    adapted = attach(vit.load(folder / BASE), bundle, name)
    merge_checkpoint(folder / BASE, [bundle], folder / f"merged-{name}")
    merged = vit.load(folder / f"merged-{name}")
    files = [folder / f"{name}.{mode}.onnx" for mode in MODES]
    for file, mode in zip(files, MODES, strict=True):
        export_onnx(
            adapted,
            test.images[:2],
            file,
            mode=mode,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: "batch"}},
            bundles={name: bundle},
        )
    report = validate(
        sides={"base": _side(base), "torch": _side(adapted), "merged": _side(merged)},
        onnx=files,
        inputs={"pixel_values": test.images.numpy()},
    )
    report.raise_for_failure()
    views = Views(test.images, predict(base, test.images), predict(adapted, test.images))
    max_abs, scale = _differences(report)
    return ShippedAdapter(
        name=name,
        coefficients=sum(spectrum.size for spectrum in bundle.spectra.values()),
        accuracy_before=accuracy(views.before, test.labels),
        accuracy_after=accuracy(views.after, test.labels),
        accuracy_onnx={file.name: _onnx_accuracy(file, test) for file in files},
        bundle=bundle_file,
        bundle_bytes=(folder / bundle_file).stat().st_size,
        merged=f"merged-{name}",
        onnx_bytes={file.name: file.stat().st_size for file in files},
        max_abs=max_abs,
        logits_scale=scale,
    ), views


def _side(model: nn.Module) -> Any:
    """A model as `validate` calls it."""

    @torch.no_grad()
    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return {"logits": model(torch.from_numpy(inputs["pixel_values"])).numpy()}

    return run


def _onnx_accuracy(file: Path, test: Split) -> float:
    """Accuracy as ONNX Runtime computes it."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": test.images.numpy()})
    return accuracy(torch.from_numpy(logits).argmax(-1), test.labels)


def _differences(report: Report) -> tuple[dict[str, float], float]:
    """By artifact, the largest absolute difference from "torch"; and the largest absolute logit."""
    found: dict[str, float] = {}
    scale = 0.0
    for pair in report.comparisons:
        difference = pair.outputs[0].difference
        if pair.left == "torch" and pair.expect == "equal" and difference is not None:
            found[pair.right.removeprefix("onnx:")] = difference.max_abs
            scale = max(scale, difference.scale)
    return found, scale
