"""samples/train_plain.py does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

from fourierft_export import Bundle

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "train_plain.py"


def test_train_capture_reload(tmp_path: Path) -> None:
    results = runpy.run_path(str(SAMPLE))["main"](tmp_path)
    assert results["base, upright"] > 0.9
    assert results["base, inverted"] < 0.3
    assert results["adapter, inverted"] > 0.8
    assert results["reloaded, inverted"] == results["adapter, inverted"]
    assert abs(results["fused, inverted"] - results["adapter, inverted"]) < 0.01
    assert results["detached, upright"] == results["base, upright"]
    bundle = Bundle.load(tmp_path / "inverted.fourierft.safetensors")
    assert [layer.shape for layer in bundle.layers] == [(128, 64), (128, 128), (10, 128)]
    assert results["bytes of the bundle"] < 4000
