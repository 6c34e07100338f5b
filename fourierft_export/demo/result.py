"""What the demo found: frozen data; files are named relative to its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ShippedAdapter:
    """One adapter, from training to the files that were proven equal.

    Attributes:
        name: the shift it was trained for, "inverted" or "rotated".
        coefficients: numbers it learned, over all layers.
        accuracy_before: of the base on the shifted test images.
        accuracy_after: of the base with the adapter's bundle attached.
        accuracy_onnx: by ONNX file, as ONNX Runtime computes it.
        bundle: file name.
        bundle_bytes: its size.
        merged: name of the checkpoint folder with the adapter merged in.
        onnx_bytes: size by ONNX file.
        max_abs: by artifact ("merged" and the ONNX files), the largest absolute difference of its
            logits from those of PyTorch with the bundle, over all test images.
        logits_scale: largest absolute logit, to read `max_abs` by.
    """

    name: str
    coefficients: int
    accuracy_before: float
    accuracy_after: float
    accuracy_onnx: Mapping[str, float]
    bundle: str
    bundle_bytes: int
    merged: str
    onnx_bytes: Mapping[str, int]
    max_abs: Mapping[str, float]
    logits_scale: float


@dataclass(frozen=True)
class DemoResult:
    """The whole demo.

    Attributes:
        directory: where the files are.
        seed: of everything random.
        images: number of images by use, "train" and "test".
        accuracy: of the base on the upright test images.
        parameters: numbers in the base.
        base: name of its checkpoint folder.
        base_bytes: size of its weights: what every fully fine-tuned copy would cost.
        adapters: one for each shift.
        picture: file name, or None where matplotlib is not installed.
        seconds: by phase, and "total".
    """

    directory: Path
    seed: int
    images: Mapping[str, int]
    accuracy: float
    parameters: int
    base: str
    base_bytes: int
    adapters: tuple[ShippedAdapter, ...]
    picture: str | None
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {
            "directory": str(self.directory),
            "adapters": [asdict(adapter) for adapter in self.adapters],
        }
