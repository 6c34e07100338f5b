"""cold-start: fresh processes of the command line against `python -c "import torch"`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from harness import Row, in_turn, within

import fourierft_export as ff
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec

ROOT = Path(__file__).resolve().parent.parent.parent


def process(*arguments: str) -> Callable[[], object]:
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, capture_output=True, check=True, cwd=ROOT)


def cold_start() -> Iterator[Row]:
    names = [f"encoder.layer.{i}.attention.self.query" for i in range(12)]
    spec = AdapterSpec(2024, 150.0, tuple(LayerSpec(name, 1000) for name in names))
    random = np.random.default_rng(0)
    spectra = {name: random.standard_normal(1000).astype(np.float32) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "adapter.fourierft.safetensors"
        ff.Bundle.build(spec, spectra).save(bundle)
        cases = {"--help": ["--help"], "inspect of a bundle": ["inspect", str(bundle)]}
        for case, arguments in cases.items():
            ours, peer = in_turn(
                process("-m", "fourierft_export", *arguments),
                process("-c", "import torch"),
                warm_up=1,
                seconds=8,
            )
            yield within("cold-start", case, ours, peer, 0.3, 'python -c "import torch"')


BARS = {"cold-start": cold_start}
