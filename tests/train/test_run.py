"""A run: equal to a plain loop, the best adapter kept, stopped and resumed bit for bit."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourierft_export as ff
from fourierft_export.adapt.modules import base_modules, fourier_layers, original
from fourierft_export.errors import (
    BadInputError,
    BaseMismatchError,
    FileAccessError,
    FourierFTError,
    UsageError,
)
from fourierft_export.train.average import Average
from fourierft_export.train.epoch_batches import EpochBatches, epoch_batches
from tests.train.toy import small_task as make_task
from tests.train.toy import tag_loss

FAST = {"n_frequency": 30, "scaling": 20.0, "learning_rate": 0.3, "head_learning_rate": 0.02}
FAST |= {"batch_size": 8, "epochs": 3, "group_lengths": False, "device": "cpu"}
train = partial(ff.train_adapter, picture=False)


def settings(**changes: Any) -> ff.TrainSettings:
    return ff.TrainSettings(**(FAST | changes))


# --- the order of rows


def test_an_epoch_has_every_row_once_whatever_the_processes() -> None:
    whole = epoch_batches(43, 8, seed=3, epoch=1)
    assert sorted(row for batch in whole for row in batch) == list(range(43))
    assert [len(batch) for batch in whole] == [8] * 5 + [3]
    assert whole != epoch_batches(43, 8, seed=3, epoch=2) != epoch_batches(43, 8, seed=4, epoch=2)
    for world, parts in ((1, 1), (2, 1), (1, 3), (3, 1)):
        shares = []
        for rank in range(world):
            batches = EpochBatches(43, 8, seed=3, parts=parts, rank=rank, world=world)
            batches.set_epoch(1)
            shares.append(list(batches))
            assert len(batches) == len(shares[-1]) == 6 * parts == batches.steps * parts
        for step, batch in enumerate(whole):
            mine = [share[step * parts + part] for share in shares for part in range(parts)]
            assert [row for part in mine for row in part] == batch
    # A rest of too few rows for all processes joins the batch before.
    assert [len(batch) for batch in EpochBatches(41, 8, seed=0, parts=2, world=1)] == [4] * 8 + [
        4,
        5,
    ]
    with pytest.raises(UsageError, match="a row for each of 3 processes and 4 parts"):
        EpochBatches(43, 8, seed=3, parts=4, world=3)


def test_rows_of_like_length_meet() -> None:
    lengths = [(7 * i) % 50 for i in range(400)]
    batches = epoch_batches(400, 8, seed=0, epoch=0, lengths=lengths)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 3
    longest = [max(lengths[i] for i in b) for b in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


# --- learning


def plain_run(task: ff.TrainingTask, steps: int, clip: float) -> tuple[list[float], dict[str, Any]]:
    """Whole batches, mean loss, torch's own schedule and clipping; written from the definition."""
    config = ff.FourierFTConfig(
        n_frequency=30,
        scaling=20.0,
        random_loc_seed=2024,
        target_modules=["down", "up"],
        modules_to_save=["head"],
        init_weights=True,
    )
    model = ff.inject(task.model, config).train()
    spectra = [p for name, p in model.named_parameters() if name.endswith("spectrum")]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "spectrum" not in n]
    groups = [{"params": spectra, "lr": 0.3}, {"params": head, "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rising = math.ceil(0.2 * steps)

    def factor(s: int) -> float:
        return (s + 1) / (rising + 1) if s < rising else 1 - (s - rising) / max(1, steps - rising)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for number in range(steps):
        epoch, place = divmod(number, 5)
        rows = epoch_batches(40, 8, seed=0, epoch=epoch)[place]
        found = [model(task.train_dataset[i][0][None])["logits"][0] for i in rows]
        loss = F.cross_entropy(
            torch.cat(found), torch.cat([task.train_dataset[i][1] for i in rows])
        )
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(spectra + head, clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, dict(ff.capture(model).spectra)


@pytest.mark.parametrize(("clip", "accumulate"), [(0.0, 1), (0.05, 3)])
def test_equal_to_a_plain_loop(clip: float, accumulate: int, tmp_path: Path) -> None:
    """Rows have 1 to 5 items, so that averaging averages would differ at once."""
    expected, spectra = plain_run(make_task(), 15, clip)
    changes = {"layer_rates": "same", "warmup": 0.2, "max_grad_norm": clip, "keep": "last"}
    changes |= {"schedule": "linear", "average": 0.0}
    report = train(make_task(), tmp_path / "a", settings(accumulate=accumulate, **changes))
    assert report.curves["loss"] == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < 0.8 * expected[0]
    bundle = ff.Bundle.load(tmp_path / "a")
    for name, values in spectra.items():
        assert abs(bundle.spectra[name] - values).max() < 2e-4 * abs(values).max()


def test_weight_decay_is_for_matrices_of_heads(tmp_path: Path) -> None:
    """Without gradients AdamW multiplies by 1 - rate * decay; others stay."""

    def still(*args: Any, **kwargs: Any) -> Tensor:
        return tag_loss(*args, **kwargs) * 0.0

    task = replace(make_task(rows=8), compute_loss_func=still)
    before = copy.deepcopy(task.model.state_dict())
    run = settings(steps=1, epochs=None, weight_decay=0.5, warmup=0.0, init_weights=False)
    train(task, tmp_path / "a", run)
    saved = ff.Bundle.load(tmp_path / "a").saved
    expected = before["head.weight"] * (1 - 0.02 * 0.5)
    assert torch.allclose(torch.tensor(saved["head.weight"]), expected, rtol=1e-6, atol=0)
    assert (torch.tensor(saved["head.bias"]) == before["head.bias"]).all()


def test_the_bundle_is_the_best_adapter(tmp_path: Path) -> None:
    task = make_task()
    report = train(task, tmp_path / "a", settings(epochs=6))
    found = {e["step"]: e["metrics"]["accuracy"] for e in report.evaluations}
    assert list(found) == [0, 5, 10, 15, 20, 25, 30]
    learnt = {step: value for step, value in found.items() if step}
    assert report.best["accuracy"] == max(learnt.values()) == learnt[report.best_step]
    assert report.best["accuracy"] > report.before["accuracy"] + 0.2
    fresh = make_task()
    ff.attach(fresh.model, ff.Bundle.load(tmp_path / "a"))
    batch = fresh.data_collator(fresh.eval_dataset)
    right = fresh.model(batch["x"])["logits"].argmax(-1) == batch["labels"]
    accuracy = right[batch["labels"] != -100].float().mean()
    assert float(accuracy) == pytest.approx(report.best["accuracy"])
    # The caller's model has the same adapter, ready to use.
    assert not task.model.training
    assert ff.capture(task.model).sha256 == ff.Bundle.load(tmp_path / "a").sha256
    assert set(report.parameters.values()) == {60, 51}


def test_keep_last_other_metrics_and_patience(tmp_path: Path) -> None:
    last = train(make_task(), tmp_path / "a", settings(keep="last", eval_every=4))
    assert [e["step"] for e in last.evaluations] == [0, 4, 8, 12, 15]
    assert last.best_step == 15
    lowest = train(make_task(), tmp_path / "b", settings(metric="loss", epochs=8))
    losses = {e["step"]: e["metrics"]["loss"] for e in lowest.evaluations if e["step"]}
    assert lowest.best["loss"] == min(losses.values()) == losses[lowest.best_step]
    assert lowest.higher_is_better is False
    with pytest.raises(UsageError, match="one of loss, accuracy, found acuracy"):
        train(make_task(), tmp_path / "c", settings(metric="acuracy"))
    assert not (tmp_path / "c").exists()
    # A rate of zero never gets better than at the first evaluation, whatever is kept.
    still = settings(learning_rate=0.0, head_learning_rate=0.0, patience=2, epochs=9)
    for name, keep, best in (("d", "best", 5), ("e", "last", 15)):
        report = train(make_task(), tmp_path / name, replace(still, keep=keep))
        assert (report.stopped, report.steps, report.planned_steps) == ("patience", 15, 45)
        assert report.best_step == best
    report = train(make_task(), tmp_path / "d", replace(still, patience=3), resume=True)
    assert report.steps == 20


def test_rows_are_held_out_where_none_are_given(tmp_path: Path) -> None:
    report = train(make_task(evals=False), tmp_path / "a", settings(eval_share=0.25))
    assert (report.rows, report.eval_rows) == (30, 10)
    assert report.notes == ("no rows to score were given: 10 of 40 training rows are held out",)
    report = train(make_task(evals=False), tmp_path / "b", settings(eval_share=0.0, epochs=1))
    assert (report.rows, report.eval_rows, report.best_step) == (40, 0, 5)
    assert report.before == report.best == {}
    assert ff.Bundle.load(tmp_path / "b").layers
    with pytest.raises(UsageError, match="training rows: expected at least one"):
        train(replace(make_task(), train_dataset=[]), tmp_path / "c")


@pytest.mark.parametrize(("budget", "counts"), [(41, [20, 20]), (130, [60, 70])])
def test_a_budget_of_coefficients(budget: int, counts: list[int], tmp_path: Path) -> None:
    run = ff.TrainSettings(budget=budget, steps=2, batch_size=8, device="cpu")
    report = train(make_task(), tmp_path / "a", run)
    assert [x.n_frequency for x in ff.Bundle.load(tmp_path / "a").layers] == counts
    assert report.parameters["spectra"] == sum(counts)
    with pytest.raises(UsageError, match="at least 1 for each of 2 layers, found 1"):
        train(make_task(), tmp_path / "b", replace(run, budget=1))


def test_suggestions_are_what_a_run_uses(tmp_path: Path) -> None:
    run = ff.TrainSettings(
        steps=3, batch_size=8, layer_rates="same", schedule="linear", device="cpu"
    )
    report = train(make_task(), tmp_path / "a", run)
    found = ff.suggest(make_task().model, steps=3, target_modules=["down", "up"])
    assert found == {
        "n_frequency": report.adapter["n_frequency"],
        "scaling": report.adapter["scaling"],
        "init_weights": True,
        "learning_rate": pytest.approx(report.rates["spectra"], rel=1e-3),
    }


def test_defaults_need_nothing_but_rows(tmp_path: Path) -> None:
    report = ff.train_adapter(make_task(), tmp_path / "a")
    assert report.settings["epochs"] and report.settings["batch_size"]
    assert report.adapter["n_frequency"] == 12 * 20 // 4
    assert report.best["loss"] < report.before["loss"]
    assert (tmp_path / "a.train/curve.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "a.train/metrics.json").read_text("utf-8"))
    assert told["picture"] == str(tmp_path / "a.train/curve.png")
    assert len(told["curves"]["loss"]) == report.steps == len(told["curves"]["seconds"])
    assert not torch.distributed.is_initialized()


def test_an_existing_adapter_is_trained_further(tmp_path: Path) -> None:
    first = train(make_task(), tmp_path / "a", settings(epochs=4))
    bundle = ff.Bundle.load(tmp_path / "a")
    plain = {k: v for k, v in FAST.items() if k not in ("n_frequency", "scaling")}
    further = ff.TrainSettings(**plain)  # type: ignore[arg-type]
    report = train(make_task(), tmp_path / "b", further, bundle=bundle)
    assert report.before == pytest.approx(first.best)
    assert report.adapter["scaling"] == 20.0
    assert ff.Bundle.load(tmp_path / "b").sha256 != bundle.sha256
    with pytest.raises(UsageError, match="n_frequency, scaling"):
        train(make_task(), tmp_path / "c", settings(), bundle=bundle)
    other = make_task()
    nn.init.normal_(other.model.down.weight)
    with pytest.raises(BaseMismatchError):
        train(other, tmp_path / "c", further, bundle=bundle)
    assert not list(tmp_path.glob("c*"))


# --- what goes wrong, and what is left alone


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    calls = 0

    def breaks(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return tag_loss(*args, **kwargs) * (float("nan") if calls == 8 else 1.0)

    task = replace(make_task(), compute_loss_func=breaks)
    with pytest.raises(UsageError, match=r"step 8: .*a loss of nan; .*--learning-rate"):
        train(task, tmp_path / "a", settings())
    # What is left is the adapter of the first evaluation, and a run can go on from there.
    ff.attach(make_task().model, ff.Bundle.load(tmp_path / "a"))
    assert train(make_task(), tmp_path / "a", settings(), resume=True).steps == 15

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, *gradients: Tensor) -> Any:
            return gradients[0] * float("inf")

    def explodes(*args: Any, **kwargs: Any) -> Tensor:
        return Breaks.apply(tag_loss(*args, **kwargs))

    task = replace(make_task(), compute_loss_func=explodes)
    with pytest.raises(UsageError, match=r"step 1: .*a gradient of length"):
        train(task, tmp_path / "b", settings())


def test_outputs_are_looked_at_first(tmp_path: Path) -> None:
    train(make_task(), tmp_path / "a", settings(epochs=1))
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        train(make_task(), tmp_path / "a", settings(epochs=1))
    with pytest.raises(UsageError, match="expected one of them, found both"):
        train(make_task(), tmp_path / "a", settings(), force=True, resume=True)
    report = train(make_task(), tmp_path / "a", settings(epochs=1, seed=3), force=True)
    assert report.steps == 5
    after = (tmp_path / "a").read_bytes()
    assert after != before
    assert not list(tmp_path.glob("*partial*"))
    # A run that cannot begin leaves what it would have replaced.
    for wrong in ({"metric": "acuracy"}, {"n_frequency": 10**6}, {"device": "abacus"}):
        with pytest.raises(UsageError):
            train(make_task(), tmp_path / "a", settings(**wrong), force=True)
        assert (tmp_path / "a").read_bytes() == after
        assert (tmp_path / "a.train/checkpoint-5").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "e.train").write_text("notes")
    for out, found in (("d", "a folder"), ("e", "a file")):
        with pytest.raises(FileAccessError, match=f"found {found}"):
            train(make_task(), tmp_path / out, settings(), force=True)


def test_the_base_and_the_global_generator_stay(tmp_path: Path) -> None:
    """Statistics of a frozen BatchNorm too: a bundle does not hold them."""
    task = make_task(norm=True, dropout=0.2)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    train(task, tmp_path / "a", settings())
    assert (torch.get_rng_state() == state).all()
    after = {path: original(m) for path, m in base_modules(task.model)}
    for name, value in before.items():
        path, _, leaf = name.rpartition(".")
        assert (getattr(after[path], leaf) == value).all(), name


def test_dropout_is_off_unless_it_is_wanted(tmp_path: Path) -> None:
    def losses(name: str, probability: float, **changes: Any) -> Sequence[float]:
        run = settings(steps=3, epochs=None, **changes)
        return train(make_task(dropout=probability), tmp_path / name, run).curves["loss"]

    plain = losses("a", 0.0)
    assert losses("b", 0.5) == plain
    kept = [losses(f"c{n}", 0.5, dropout=True, seed=n // 2) for n in range(3)]
    assert kept[0] == kept[1] != kept[2] and plain != kept[0]


def test_mixed_precision(tmp_path: Path) -> None:
    task = make_task()
    report = train(task, tmp_path / "a", settings(dtype="bfloat16", epochs=6))
    exact = train(make_task(), tmp_path / "b", settings(epochs=6))
    assert report.curves["loss"] != exact.curves["loss"]
    assert report.curves["loss"] == pytest.approx(exact.curves["loss"], rel=0.05, abs=0.02)
    for layer in fourier_layers(task.model).values():
        assert layer.adapter("default").spectrum.dtype == torch.float32
        assert layer.linear.weight.dtype == torch.bfloat16
    # The bundle is bound to the float32 base that the task brought.
    bundle = ff.Bundle.load(tmp_path / "a")
    assert {layer.fingerprint.dtype for layer in bundle.layers if layer.fingerprint} == {"F32"}
    ff.attach(make_task().model, bundle)
    with pytest.raises(UsageError, match="dtype float16: expected a GPU"):
        train(make_task(), tmp_path / "c", settings(dtype="float16"))


def test_gradient_checkpointing(tiny_model: Callable[[str], Any], tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 60, (8, 16))]
    run = ff.TrainSettings(batch_size=2, steps=3, device="cpu")
    runs = []
    for name, saving in (("a", False), ("b", True)):
        task = ff.TrainingTask(tiny_model("llama"), rows, rows[:2])
        changed = replace(run, gradient_checkpointing=saving)
        runs.append(train(task, tmp_path / name, changed).curves["loss"])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    assert runs[0][-1] != runs[0][0]
    with pytest.raises(UsageError, match="Tagger"):
        train(make_task(), tmp_path / "c", settings(gradient_checkpointing=True))


# --- the mean over the last steps


def test_the_adapter_is_the_mean_over_the_last_steps(tmp_path: Path) -> None:
    """Of the adapters that runs of 7 to 10 steps end with; that one is scored, and left on."""
    plain = settings(epochs=None, schedule="constant", warmup=0.0, average=0.0, threads=1)
    ends = []
    for steps in range(7, 11):
        train(make_task(), tmp_path / f"{steps}", replace(plain, steps=steps, keep="last"))
        ends.append(ff.Bundle.load(tmp_path / f"{steps}"))
    task, averaged = make_task(), replace(plain, steps=10, average=0.4, keep="last")
    report = train(task, tmp_path / "mean", averaged)
    mean = ff.Bundle.load(tmp_path / "mean")
    assert mean.spectra and mean.saved
    for name, found in (*mean.spectra.items(), *mean.saved.items()):
        values = [(end.spectra.get(name, end.saved.get(name))).astype("f8") for end in ends]
        np.testing.assert_allclose(found, sum(values) / 4, atol=1e-6)
        assert np.abs(found - values[-1]).max() > 1e-3
    assert ff.capture(task.model).to_bytes() == mean.to_bytes()
    last = json.loads((tmp_path / "10.train" / "metrics.json").read_text("utf-8"))
    assert report.curves["loss"] == last["curves"]["loss"]  # averaging changes no step
    assert report.best != last["best"]
    again = ff.TrainSettings(steps=1, batch_size=8, device="cpu")
    scored = train(make_task(), tmp_path / "again", again, bundle=tmp_path / "mean")
    assert scored.before == pytest.approx(report.best)


def test_a_mean_of_half_precision_is_kept_in_float32() -> None:
    """In bfloat16 the hundredth step would be rounded away."""
    values = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)) + 1
    parameter = nn.Parameter(torch.zeros(50, dtype=torch.bfloat16))
    adapter: Any = SimpleNamespace(learning=lambda: [parameter])
    average, expected = Average(adapter, 1.0), torch.zeros(50, dtype=torch.float64)
    for step, value in enumerate(values, 1):
        parameter.data.copy_(value)
        expected += parameter.detach().double() / 400
        average.on_step_end(None, SimpleNamespace(global_step=step, max_steps=400))
    assert torch.allclose(average.means[0].double(), expected, rtol=0, atol=1e-5)
    with average.in_use():
        assert (parameter == expected.bfloat16()).float().mean() > 0.9  # but for ties
    assert (parameter == values[-1].bfloat16()).all()


# --- stopped and resumed

RUN = settings(
    epochs=4,
    weight_decay=0.01,
    schedule="cosine",
    average=0.5,  # from step 11 of 20
    dropout=True,
    group_lengths=True,
    threads=1,
)


def interrupted(task: ff.TrainingTask, at: int, number: int = signal.SIGINT) -> ff.TrainingTask:
    """The task, with a signal in the middle of training step `at` (from 1)."""
    calls = 0

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == at and torch.is_grad_enabled():
            os.kill(os.getpid(), number)
        return tag_loss(*args, **kwargs)

    return replace(task, compute_loss_func=loss)


def everything(folder: Path, name: str) -> dict[str, Any]:
    """All that a run leaves, without what depends on the clock."""
    out = folder / f"{name}.train"
    found = json.loads((out / "metrics.json").read_text("utf-8"))
    (checkpoint,) = out.glob("checkpoint-*")
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return {
        "bundle": (folder / name).read_bytes(),
        "last": {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")},
        "optimizer": {k: v["exp_avg_sq"].tolist() for k, v in optimizer.items()},
        "losses": found["curves"]["loss"],
        "norms": found["curves"]["gradient_norm"],
        "evaluations": found["evaluations"],
        "best": (found["best"], found["best_step"], found["stopped"]),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that is never stopped: 20 steps with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    train(make_task(dropout=0.3), folder / "a", RUN)
    return everything(folder, "a")


@pytest.mark.parametrize("stops", [[1], [5], [7, 11]])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(
    stops: list[int], whole: dict[str, Any], tmp_path: Path
) -> None:
    done = 0
    for at in stops:
        task = interrupted(make_task(dropout=0.3), at - done)
        with pytest.raises(KeyboardInterrupt) as caught:
            train(task, tmp_path / "a", RUN, resume=bool(done))
        done = at
        assert f"holds step {at} of 20, for --resume" in str(caught.value)
        assert ("no bundle yet" in str(caught.value)) == (at < 5)
        assert (tmp_path / "a").exists() == (at >= 5)
    torch.manual_seed(at)  # whatever the generator holds
    report = train(make_task(dropout=0.3), tmp_path / "a", RUN, resume=True)
    assert report.stopped == "finished"
    assert everything(tmp_path, "a") == whole
    # A finished run has nothing left to do.
    assert train(make_task(dropout=0.3), tmp_path / "a", RUN, resume=True).steps == 20
    assert everything(tmp_path, "a") == whole


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    task = make_task()

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return tag_loss(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(replace(task, compute_loss_func=loss), tmp_path / "a", RUN)
    assert not str(caught.value)
    assert not list((tmp_path / "a.train").glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(task, tmp_path / "a", RUN)  # the adapter is off the model again


KILLED = """
import signal, sys
from tests.train import test_run, toy
from fourierft_export.train import training_run
training_run.SAVE_SECONDS = 0.0
task = test_run.interrupted(toy.small_task(dropout=0.3), {at}, signal.SIGKILL)
test_run.train(task, {out!r}, test_run.RUN)
"""


@pytest.mark.parametrize("at", [3, 14])
def test_a_killed_run_goes_on(at: int, whole: dict[str, Any], tmp_path: Path) -> None:
    script = KILLED.format(at=at, out=str(tmp_path / "a"))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (checkpoint,) = (tmp_path / "a.train").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{at - 1}"
    assert (tmp_path / "a").exists() == (at > 5)
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 60_000
    if at > 5:  # killed between the checkpoint and the bundle
        (tmp_path / "a").write_bytes(b"")
        (tmp_path / "a").unlink()
        with pytest.raises(FileAccessError, match="the best adapter so far, of step 5"):
            train(make_task(dropout=0.3), tmp_path / "a", RUN, resume=True)
        return
    train(make_task(dropout=0.3), tmp_path / "a", RUN, resume=True)
    assert everything(tmp_path, "a") == whole
    assert not list(tmp_path.glob("**/*partial*"))


def test_a_run_that_changed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="leave --resume out"):
        train(make_task(), tmp_path / "a", RUN, resume=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        train(interrupted(make_task(), 6), tmp_path / "a", RUN)
    before = (tmp_path / "a").read_bytes()
    other = make_task()
    nn.init.normal_(other.model.up.weight)
    cases: list[tuple[Any, dict[str, Any], list[str]]] = [
        (make_task(), {"seed": 1}, ["seed: 0 then, 1 now"]),
        (
            make_task(),
            {"epochs": 5, "schedule": "linear"},
            ["epochs: 4 then, 5 now", "schedule: 'cosine' then, 'linear' now"],
        ),
        (
            make_task(),
            {"n_frequency": 31},
            ["n_frequency: 30 then, 31 now", "adapter: another than then"],
        ),
        (other, {}, ["adapter: another than then"]),
        (make_task(rows=39), {}, ["rows: 40 then, 39 now"]),
    ]
    for task, changes, told in cases:
        with pytest.raises(UsageError, match="--force in place of --resume") as caught:
            train(task, tmp_path / "a", replace(RUN, **changes), resume=True)
        assert list(caught.value.offenders) == told or caught.value.found == told[0]
        assert (tmp_path / "a").read_bytes() == before
    checkpoint = tmp_path / "a.train" / "checkpoint-6"
    for file in sorted(path for path in checkpoint.iterdir() if path.name != "trainer_state.json"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(FourierFTError) as error:
            train(make_task(), tmp_path / "a", RUN, resume=True)
        assert isinstance(error.value, BadInputError), (file, error.value)
        file.write_bytes(content)
    train(make_task(), tmp_path / "a", replace(RUN, accumulate=2, patience=9), resume=True)


def test_a_lost_last_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(interrupted(make_task(), 12), tmp_path / "a", RUN)
    lost = tmp_path / "a.train" / "checkpoint-12" / "last_step.fourierft.safetensors"
    lost.unlink()
    with pytest.raises(FileAccessError, match="last_step"):
        train(make_task(), tmp_path / "a", RUN, resume=True)


def test_a_plan_that_changed_is_refused(tmp_path: Path) -> None:
    """41 rows in batches of 8: the last row is a step of its own, unless a batch has two parts."""
    with pytest.raises(KeyboardInterrupt):
        train(interrupted(make_task(rows=41), 2), tmp_path / "a", RUN)
    parts = replace(RUN, accumulate=2)
    with pytest.raises(UsageError) as caught:
        train(make_task(rows=41), tmp_path / "a", parts, resume=True)
    (line,) = caught.value.offenders
    assert "--accumulate" in line and line.endswith(": 6 then, 5 now")
    assert train(make_task(rows=41), tmp_path / "a", RUN, resume=True).steps == 24


@pytest.mark.parametrize("given", [{"patience": 2}, {"metric": "accuracy"}])
def test_what_needs_scores_is_refused_without_rows_to_score(
    given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(given))}: expected rows to score"):
        train(make_task(evals=False), tmp_path / "a", settings(eval_share=0.0, **given))
    assert not list(tmp_path.iterdir())
