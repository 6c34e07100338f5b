"""Every fault that the validation exists for is planted and must be found; clean sets pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fourierft_export as ff
from fourierft_export.errors import ValidationError

FAULTS = ("adapter zeroed", "head dropped", "head * 1.01", "delta transposed", "seed + 1")
FAULTS += ("scaling * 1.01",)

Plant = Callable[..., Path]


def test_a_clean_set_passes(classifier: Any, plant: Plant, clean_onnx: Path) -> None:
    base, adapter, bundle = classifier
    report = ff.validate(base=base, bundle=bundle, peft=adapter, merged=plant(), onnx=clean_onnx)
    report.raise_for_failure()
    assert report.ok
    assert [side.name for side in report.sides] == [
        "base",
        "torch",
        "peft",
        "merged",
        "onnx:clean.onnx",
    ]
    equal = {(pair.left, pair.right) for pair in report.comparisons if pair.expect == "equal"}
    assert len(equal) == 6  # every pair of the four adapted sides
    different = {(pair.left, pair.right) for pair in report.comparisons if pair.expect != "equal"}
    assert different == {("base", name) for name in ("torch", "peft", "merged", "onnx:clean.onnx")}
    assert report.notes == ()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_merged_directory_is_found(classifier: Any, plant: Plant, fault: str) -> None:
    report = ff.validate(base=classifier.base, bundle=classifier.bundle, merged=plant(fault))
    assert not report.ok
    with pytest.raises(ValidationError) as caught:
        report.raise_for_failure()
    assert caught.value.exit_code == 5
    assert caught.value.where == "torch against merged, output logits"
    failing = {(pair.left, pair.right) for pair in report.comparisons if not pair.ok}
    unchanged = {("base", "merged")} if fault == "adapter zeroed" else set()
    assert failing == {("torch", "merged")} | unchanged


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_onnx_file_is_found(
    classifier: Any, plant: Plant, plant_onnx: Callable[[str], Path], fault: str
) -> None:
    file = plant_onnx(fault)
    report = ff.validate(
        base=classifier.base, bundle=classifier.bundle, merged=plant(), onnx=[file]
    )
    with pytest.raises(ValidationError) as caught:
        report.raise_for_failure()
    assert caught.value.exit_code == 5
    assert caught.value.where == "torch against onnx:planted.onnx, output logits"
    assert report.suspects == ("onnx:planted.onnx",)
    assert "onnx:planted.onnx" in caught.value.remedy


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_without_the_bundle(
    classifier: Any, plant: Plant, clean_onnx: Path, fault: str
) -> None:
    """PEFT and the graph are enough to convict a merged directory."""
    report = ff.validate(
        base=classifier.base, peft=classifier.adapter, merged=plant(fault), onnx=clean_onnx
    )
    with pytest.raises(ValidationError):
        report.raise_for_failure()
    assert report.suspects == ("merged",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_in_half_precision_passes(
    classifier: Any, plant: Plant, clean_onnx: Path, dtype: torch.dtype
) -> None:
    merged = plant(dtype=dtype)
    report = ff.validate(
        base=classifier.base, bundle=classifier.bundle, merged=merged, onnx=clean_onnx
    )
    report.raise_for_failure()
    precision = str(dtype).removeprefix("torch.")
    by_name = {side.name: side for side in report.sides}
    assert by_name["merged"].precision == precision
    assert f"torch:{precision}" in by_name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_half_precision_merge_is_found(
    classifier: Any, plant: Plant, fault: str, dtype: torch.dtype
) -> None:
    """A hundredth of the delta is far below bfloat16's rounding: like is compared with like."""
    report = ff.validate(base=classifier.base, bundle=classifier.bundle, merged=plant(fault, dtype))
    with pytest.raises(ValidationError):
        report.raise_for_failure()
    precision = str(dtype).removeprefix("torch.")
    failing = [(p.left, p.right) for p in report.comparisons if not p.ok]
    assert (f"torch:{precision}", "merged") in failing
