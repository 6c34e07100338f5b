"""Stopping, dying, going on: a resumed run is the run that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from fourierft_export import Bundle, detach
from fourierft_export.errors import BadInputError, FileAccessError, UsageError
from fourierft_export.train import run as running
from fourierft_export.train.interrupt import TrainingInterrupted
from fourierft_export.train.settings import TrainSettings
from fourierft_export.train.state import load_state
from fourierft_export.train.task import StepResult, TrainingTask
from fourierft_export.train.train import train_adapter as train_adapter_and_draw

MakeTask = Callable[..., TrainingTask]
train_adapter = partial(train_adapter_and_draw, picture=False)
RUN = TrainSettings(
    n_frequency=30,
    learning_rate=0.3,
    head_learning_rate=0.02,
    batch_size=8,
    epochs=4,
    device="cpu",
    weight_decay=0.01,
    schedule="cosine",
    dropout=True,
    threads=1,  # sums of another number of threads are rounded in another order
)


def with_interrupt(task: TrainingTask, at: int) -> TrainingTask:
    """The task, with one Ctrl-C in the middle of training step `at` (from 1)."""
    calls = 0

    def step(model: nn.Module, batch: Any) -> StepResult:
        nonlocal calls
        calls += model.training
        if calls == at and model.training:
            os.kill(os.getpid(), signal.SIGINT)
        return task.step(model, batch)

    return replace(task, step=step)


def everything(folder: Path, name: str) -> dict[str, Any]:
    """All that a run leaves, without what depends on the clock."""
    out = folder / f"{name}.train"
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    with safe_open(out / "state.safetensors", "np") as file:
        tensors = {k: file.get_tensor(k).tobytes() for k in file.keys() if "seconds" not in k}  # noqa: SIM118
    return {
        "bundle": (folder / name).read_bytes(),
        "tensors": tensors,
        "losses": metrics["curves"]["loss"],
        "norms": metrics["curves"]["gradient_norm"],
        "evaluations": metrics["evaluations"],
        "best": (metrics["best"], metrics["best_step"], metrics["stopped"]),
    }


@pytest.fixture(scope="module")
def whole(make_task: MakeTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that is never stopped: 20 steps with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    train_adapter(make_task(dropout=0.3), folder / "a", RUN)
    return everything(folder, "a")


@pytest.mark.parametrize("stops", [[1], [5], [7, 12], [19]])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(
    stops: list[int], whole: dict[str, Any], make_task: MakeTask, tmp_path: Path
) -> None:
    done = 0
    for at in stops:
        task = with_interrupt(make_task(dropout=0.3), at - done)
        with pytest.raises(TrainingInterrupted) as caught:
            train_adapter(task, tmp_path / "a", RUN, resume=bool(done))
        done = at
        assert f"holds step {at} of 20, for --resume" in str(caught.value)
        assert (tmp_path / "a").exists() == (at >= 5)
    torch.manual_seed(at)  # whatever the generator holds
    report = train_adapter(make_task(dropout=0.3), tmp_path / "a", RUN, resume=True)
    assert report.stopped == "finished"
    assert everything(tmp_path, "a") == whole


def test_what_an_interrupt_says(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="no bundle yet, since there was no evaluation"):
        train_adapter(with_interrupt(make_task(), 2), tmp_path / "a", RUN)
    with pytest.raises(KeyboardInterrupt, match="holds the adapter of step 5, accuracy 0"):
        train_adapter(with_interrupt(make_task(), 5), tmp_path / "a", RUN, resume=True)
    assert json.loads((tmp_path / "a.train/metrics.json").read_text())["stopped"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    Bundle.load(tmp_path / "a")


def test_a_second_interrupt_stops_at_once(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()

    def step(model: nn.Module, batch: Any) -> StepResult:
        if model.training:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return task.step(model, batch)

    with pytest.raises(KeyboardInterrupt) as caught:
        train_adapter(replace(task, step=step), tmp_path / "a", RUN)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (tmp_path / "a.train/state.safetensors").exists()
    train_adapter(task, tmp_path / "a", RUN)  # the adapter is off the model again


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import conftest
from fourierft_export.train import run
from fourierft_export.train.settings import TrainSettings
from fourierft_export.train.train import train_adapter
from dataclasses import replace
run.SAVE_SECONDS = 0.0
task = conftest.small_task(dropout=0.3)
calls = 0
def step(model, batch):
    global calls
    calls += model.training
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return task.step(model, batch)
train_adapter(replace(task, step=step), {out!r}, TrainSettings(**{settings!r}))
"""


@pytest.mark.parametrize("at", [3, 14])
def test_a_killed_run_goes_on(
    at: int, whole: dict[str, Any], make_task: MakeTask, tmp_path: Path
) -> None:
    given = {k: v for k, v in RUN.to_dict().items() if v != getattr(TrainSettings(), k)}
    script = KILLED.format(
        tests=str(Path(__file__).parent), at=at, out=str(tmp_path / "a"), settings=given
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if at > 5:
        Bundle.load(tmp_path / "a")
    state = load_state(tmp_path / "a.train/state.safetensors")
    assert len(state.history.losses) == at - 1
    train_adapter(make_task(dropout=0.3), tmp_path / "a", RUN, resume=True)
    assert everything(tmp_path, "a") == whole
    assert not list(tmp_path.glob("**/*partial*"))


def test_states_come_with_time(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch may last for hours; a state is written meanwhile."""
    seen: list[int] = []
    task = make_task()

    def step(model: nn.Module, batch: Any) -> StepResult:
        path = tmp_path / "a.train/state.safetensors"
        if model.training and path.exists():
            seen.append(len(load_state(path).history.losses))
        return task.step(model, batch)

    monkeypatch.setattr(running, "SAVE_SECONDS", 0.0)
    train_adapter(replace(task, step=step), tmp_path / "a", replace(RUN, epochs=1))
    assert seen == [1, 2, 3, 4]
    monkeypatch.setattr(running, "SAVE_SECONDS", 3600.0)
    seen.clear()
    detach(task.model)
    train_adapter(replace(task, step=step), tmp_path / "a", replace(RUN, epochs=1), force=True)
    assert seen == []


def test_a_finished_run_has_nothing_left_to_do(
    whole: dict[str, Any], make_task: MakeTask, tmp_path: Path
) -> None:
    train_adapter(make_task(dropout=0.3), tmp_path / "a", RUN)
    report = train_adapter(make_task(dropout=0.3), tmp_path / "a", RUN, resume=True)
    assert report.steps == 20
    assert everything(tmp_path, "a") == whole


def test_more_patience_goes_on_where_it_ended(make_task: MakeTask, tmp_path: Path) -> None:
    still = replace(RUN, learning_rate=0.0, head_learning_rate=0.0, patience=1)
    assert train_adapter(make_task(), tmp_path / "a", still).steps == 10
    longer = replace(still, patience=2)
    assert train_adapter(make_task(), tmp_path / "a", longer, resume=True).steps == 15


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, ["seed: 0 then, 1 now"]),
        (
            {"epochs": 5, "schedule": "linear"},
            ["epochs: 4 then, 5 now", "schedule: 'cosine' then, 'linear' now"],
        ),
        ({"n_frequency": 31}, ["n_frequency: 30 then, 31 now", "adapter: another than then"]),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], told: list[str], make_task: MakeTask, tmp_path: Path
) -> None:
    with pytest.raises(TrainingInterrupted):
        train_adapter(with_interrupt(make_task(), 6), tmp_path / "a", RUN)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(UsageError, match="--force in place of --resume") as caught:
        train_adapter(make_task(), tmp_path / "a", replace(RUN, **changes), resume=True)
    assert list(caught.value.offenders) == told
    assert (tmp_path / "a").read_bytes() == before
    train_adapter(make_task(), tmp_path / "a", replace(RUN, accumulate=2, threads=1), resume=True)


def test_another_base_or_other_rows_are_refused(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train_adapter(with_interrupt(make_task(), 6), tmp_path / "a", RUN)
    other: Any = make_task()
    nn.init.normal_(other.model.up.weight)
    with pytest.raises(UsageError) as caught:
        train_adapter(other, tmp_path / "a", RUN, resume=True)
    assert caught.value.offenders == ("adapter: another than then",)
    with pytest.raises(UsageError) as caught:
        train_adapter(make_task(rows=39), tmp_path / "a", RUN, resume=True)
    assert caught.value.offenders == ("rows: another than then",)


def test_a_run_whose_bundle_is_gone_does_not_go_on(make_task: MakeTask, tmp_path: Path) -> None:
    """Its best adapter was there alone."""
    with pytest.raises(TrainingInterrupted):
        train_adapter(with_interrupt(make_task(), 6), tmp_path / "a", RUN)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(FileAccessError, match="the best adapter so far, of step 5"):
        train_adapter(make_task(), tmp_path / "a", RUN, resume=True)
    (tmp_path / "b").rename(tmp_path / "a")
    assert train_adapter(make_task(), tmp_path / "a", RUN, resume=True).steps == 20


def test_states_that_are_none(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="leave --resume out"):
        train_adapter(make_task(), tmp_path / "a", RUN, resume=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainingInterrupted):
        train_adapter(with_interrupt(make_task(), 6), tmp_path / "a", RUN)
    path = tmp_path / "a.train/state.safetensors"
    good = path.read_bytes()
    for damaged in (b"", good[:50], b"\x80\x04pickle" + good, good[:-8]):
        path.write_bytes(damaged)
        with pytest.raises(BadInputError):
            train_adapter(make_task(), tmp_path / "a", RUN, resume=True)
    lacking = good.replace(b"history:losses", b"history:lossez")  # whole, but for a name
    assert lacking != good
    path.write_bytes(lacking)
    with pytest.raises(BadInputError, match="lacks something: KeyError"):
        train_adapter(make_task(), tmp_path / "a", RUN, resume=True)
    path.write_bytes((tmp_path / "a").read_bytes())  # a bundle is a safetensors file, too
    with pytest.raises(BadInputError, match="another safetensors file"):
        train_adapter(make_task(), tmp_path / "a", RUN, resume=True)


def test_a_state_is_kilobytes_and_plain_numbers(make_task: MakeTask, tmp_path: Path) -> None:
    report = train_adapter(make_task(), tmp_path / "a", RUN)
    path = tmp_path / "a.train/state.safetensors"
    learning = sum(report.parameters.values())
    assert path.stat().st_size < 3 * 4 * learning + 8000  # the adapter, and AdamW's two moments
    with safe_open(path, "np") as file:
        assert all(np.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
    assert {p.name for p in (tmp_path / "a.train").iterdir()} == {
        "state.safetensors",
        "metrics.json",
    }
