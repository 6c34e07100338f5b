"""The picture and the numbers of a run, for people and for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fourierft_export.train.curve import smoothed
from fourierft_export.train.settings import TrainSettings
from fourierft_export.train.task import TrainingTask
from fourierft_export.train.train import train_adapter

MakeTask = Callable[..., TrainingTask]
RUN = TrainSettings(batch_size=8, epochs=2, device="cpu")


def test_the_picture_and_the_metrics(make_task: MakeTask, tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread

    report = train_adapter(make_task(), tmp_path / "a", RUN, metrics=tmp_path / "m.json")
    assert report.picture == str(tmp_path / "a.train/curve.png")
    image = imread(report.picture)
    assert image.shape[1] > 2 * image.shape[0] > 600
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    told = json.loads((tmp_path / "m.json").read_text("utf-8"))
    assert not (tmp_path / "a.train/metrics.json").exists()
    assert told == json.loads(json.dumps(report.to_dict()))
    assert told["bundle_bytes"] == (tmp_path / "a").stat().st_size
    assert told["parameters"] == {"spectra": 2 * 60, "heads": 16 * 3 + 3}
    assert len(told["curves"]["loss"]) == told["steps"] == told["planned_steps"] == 10
    assert told["versions"]["torch"].startswith("2.")
    assert told["settings"]["warmup"] is not None
    assert told["seconds_per_step"] > 0
    assert "curves" not in report.to_dict(curves=False)


def test_a_picture_without_scores(make_task: MakeTask, tmp_path: Path) -> None:
    from matplotlib.image import imread

    task = make_task(evals=False)
    run = TrainSettings(batch_size=8, epochs=1, eval_share=0.0, device="cpu")
    report = train_adapter(task, tmp_path / "a", run)
    assert report.picture is not None
    assert imread(report.picture).shape[1] < 800


def test_without_matplotlib_it_says_so(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = train_adapter(make_task(), tmp_path / "a", RUN)
    assert report.picture is None
    assert "pip install 'fourierft-export[report]'" in report.notes[-1]
    assert (tmp_path / "a").exists()
    assert not (tmp_path / "a.train/curve.png").exists()


def test_smoothing() -> None:
    assert smoothed([3.0, 3.0, 3.0], 2) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 5.0, 9.0, 1.0], 1) == pytest.approx([3.0, 5.0, 5.0, 5.0])
    assert smoothed([1.0, 5.0, 2.0], 0) == [1.0, 5.0, 2.0]
    assert smoothed([], 3) == []
