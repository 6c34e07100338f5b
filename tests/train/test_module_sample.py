"""The sample of a torch model of one's own, run as its first lines say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fourierft_export import Bundle

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def test_digits_learn_to_be_read_when_rotated(tmp_path: Path) -> None:
    out = tmp_path / "rotated.fourierft.safetensors"
    command = ["-m", "fourierft_export", "train", "--module", "digits_task:rotated", "--json"]
    command += ["--threads", "1", "--epochs", "2", "-o", str(out)]
    done = subprocess.run(
        [sys.executable, *command], cwd=SAMPLES, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["train"]
    assert report["before"]["accuracy"] < 0.3
    assert report["best"]["accuracy"] > 0.6
    assert len(Bundle.load(out).layers) == 26
