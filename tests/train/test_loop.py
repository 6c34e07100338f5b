"""The loop against a plain one written here, and what it keeps, scores and leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fourierft_export import Bundle, FourierFTConfig, attach, capture, inject
from fourierft_export.adapt.modules import fourier_layers, original
from fourierft_export.errors import BaseMismatchError, FileAccessError, UsageError
from fourierft_export.train import precision
from fourierft_export.train.order import epoch_batches, hold_out, mixed_seed, share
from fourierft_export.train.settings import TrainSettings
from fourierft_export.train.task import StepResult, TrainingTask
from fourierft_export.train.train import train_adapter as train_adapter_and_draw

MakeTask = Callable[..., TrainingTask]
train_adapter = partial(train_adapter_and_draw, picture=False)
FAST = {"n_frequency": 30, "scaling": 20.0, "learning_rate": 0.3, "head_learning_rate": 0.02}
FAST |= {"batch_size": 8, "epochs": 3, "group_lengths": False}


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**(FAST | {"device": "cpu"} | changes))


def accuracy(model: nn.Module, rows: Any, task: TrainingTask) -> float:
    """Row by row, without the loop."""
    right = total = 0
    with torch.no_grad():
        for x, y in rows:
            right += int((model.eval()(x[None])[0].argmax(-1) == y).sum())
            total += len(y)
    return right / total


# --- the order of rows


def test_an_epoch_has_every_row_once() -> None:
    batches = epoch_batches(23, 5, seed=3, epoch=1)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert sorted(row for batch in batches for row in batch) == list(range(23))
    assert batches == epoch_batches(23, 5, seed=3, epoch=1)
    assert batches != epoch_batches(23, 5, seed=3, epoch=2)
    assert batches != epoch_batches(23, 5, seed=4, epoch=1)


def test_rows_of_like_length_meet() -> None:
    lengths = [(i * 7919) % 100 for i in range(400)]
    batches = epoch_batches(400, 16, seed=0, epoch=0, lengths=lengths)
    assert sorted(row for batch in batches for row in batch) == list(range(400))
    assert all(len(batch) == 16 for batch in batches)

    def spread(found: list[list[int]]) -> float:
        spans = [max(lengths[r] for r in b) - min(lengths[r] for r in b) for b in found]
        return sum(spans) / len(spans)

    assert spread(batches) < 10 < 60 < spread(epoch_batches(400, 16, seed=0, epoch=0))
    longest = [max(lengths[r] for r in b) for b in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [1, 3])
def test_shares_are_the_batch(world: int, parts: int) -> None:
    batch = [5, 3, 9, 1, 0]
    shares = [share(batch, rank, world, parts) for rank in range(world)]
    assert all(len(pieces) == parts for pieces in shares)
    assert [row for pieces in shares for piece in pieces for row in piece] == batch
    sizes = [sum(map(len, pieces)) for pieces in shares]
    assert max(sizes) - min(sizes) <= 1


def test_seeds_do_not_collide() -> None:
    seeds = {mixed_seed(a, b) for a in range(60) for b in range(60)}
    assert len(seeds) == 3600
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_held_out_rows() -> None:
    learn, scored = hold_out(50, 0.1, seed=1)
    assert len(scored) == 5
    assert sorted(learn + scored) == list(range(50))
    assert hold_out(2, 0.001, seed=0)[1] in ([0], [1])
    assert len(hold_out(2, 0.99, seed=0)[0]) == 1


# --- against a plain loop


def plain_run(task: TrainingTask, steps: int, clip: float) -> tuple[list[float], dict[str, Any]]:
    """Whole batches, mean loss, torch's own schedule and clipping; written from the definition."""
    config = FourierFTConfig(
        n_frequency=30,
        scaling=20.0,
        random_loc_seed=2024,
        target_modules=["down", "up"],
        modules_to_save=["head"],
        init_weights=True,
    )
    model = inject(task.model, config).train()
    spectra = [p for name, p in model.named_parameters() if name.endswith("spectrum")]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "spectrum" not in n]
    groups = [{"params": spectra, "lr": 0.3}, {"params": head, "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rising = math.ceil(0.2 * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / (rising + 1) if s < rising else 1 - (s - rising) / max(1, steps - rising)
        ),
    )
    losses = []
    for number in range(steps):
        epoch, place = divmod(number, 5)
        rows = epoch_batches(40, 8, seed=0, epoch=epoch)[place]
        found = [model(task.train[i][0][None])[0] for i in rows]
        labels = torch.cat([task.train[i][1] for i in rows])
        loss = F.cross_entropy(torch.cat(found), labels)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(spectra + head, clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, dict(capture(model).spectra)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equal_to_a_plain_loop(
    clip: float, accumulate: int, make_task: MakeTask, tmp_path: Path
) -> None:
    """Rows have 1 to 5 items, so that averaging averages would differ at once."""
    expected, spectra = plain_run(make_task(), 15, clip)
    report = train_adapter(
        make_task(),
        tmp_path / "a",
        settings(
            layer_rates="same", warmup=0.2, max_grad_norm=clip, accumulate=accumulate, keep="last"
        ),
    )
    assert report.history.losses == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < 0.8 * expected[0]
    bundle = Bundle.load(tmp_path / "a")
    for name, values in spectra.items():
        assert abs(bundle.spectra[name] - values).max() < 2e-4 * abs(values).max()


def test_parts_without_rows(make_task: MakeTask, tmp_path: Path) -> None:
    """Batches smaller than the number of parts: 7 rows in batches of 3, 3 and 1, in 3 parts."""
    runs = [
        train_adapter(
            make_task(rows=7),
            tmp_path / str(parts),
            settings(batch_size=3, accumulate=parts, epochs=2),
        )
        for parts in (1, 3)
    ]
    assert runs[0].history.losses == pytest.approx(runs[1].history.losses, rel=1e-5)
    assert runs[0].steps == 6


def test_weight_decay_is_for_matrices_of_heads(make_task: MakeTask, tmp_path: Path) -> None:
    """Without gradients (rates aside) AdamW multiplies by 1 - rate * decay; others stay."""
    task = make_task(rows=8)

    def still(model: nn.Module, batch: Any) -> StepResult:
        return replace_loss(task.step(model, batch))

    def replace_loss(found: StepResult) -> StepResult:
        return StepResult(found.loss * 0.0, found.count, found.sums)

    before = copy.deepcopy(task.model.state_dict())
    train_adapter(
        replace(task, step=still),
        tmp_path / "a",
        settings(steps=1, epochs=None, weight_decay=0.5, warmup=0.0, init_weights=False),
    )
    saved = Bundle.load(tmp_path / "a").saved
    expected = before["head.weight"] * (1 - 0.02 * 0.5)
    assert torch.allclose(torch.tensor(saved["head.weight"]), expected, rtol=1e-6, atol=0)
    assert (torch.tensor(saved["head.bias"]) == before["head.bias"]).all()


# --- what is kept


def test_the_bundle_is_the_best_adapter(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    report = train_adapter(task, tmp_path / "a", settings(epochs=6))
    found = {e["step"]: e["metrics"]["accuracy"] for e in report.history.evaluations}
    assert list(found) == [0, 5, 10, 15, 20, 25, 30]
    learnt = {step: value for step, value in found.items() if step}
    assert report.best["accuracy"] == max(learnt.values()) == learnt[report.best_step]
    assert report.best["accuracy"] > report.before["accuracy"] + 0.2
    fresh = make_task()
    assert accuracy(fresh.model, fresh.eval, fresh) == pytest.approx(report.before["accuracy"])
    attach(fresh.model, Bundle.load(tmp_path / "a"))
    assert accuracy(fresh.model, fresh.eval, fresh) == pytest.approx(report.best["accuracy"])
    # The caller's model has the same adapter, ready to use.
    assert not task.model.training
    assert capture(task.model).sha256 == Bundle.load(tmp_path / "a").sha256


def test_keep_last_and_another_metric(make_task: MakeTask, tmp_path: Path) -> None:
    last = train_adapter(make_task(), tmp_path / "a", settings(keep="last", eval_every=4))
    assert [e["step"] for e in last.history.evaluations] == [0, 4, 8, 12, 15]
    assert last.best_step == 15
    lowest = train_adapter(make_task(), tmp_path / "b", settings(metric="loss", epochs=8))
    losses = {e["step"]: e["metrics"]["loss"] for e in lowest.history.evaluations if e["step"]}
    assert lowest.best["loss"] == min(losses.values()) == losses[lowest.best_step]
    assert lowest.higher_is_better is False
    with pytest.raises(UsageError, match="one of loss, accuracy, found acuracy"):
        train_adapter(make_task(), tmp_path / "c", settings(metric="acuracy"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_patience(keep: str, make_task: MakeTask, tmp_path: Path) -> None:
    """A rate of zero never gets better than at the first evaluation, whatever is kept."""
    run = settings(learning_rate=0.0, head_learning_rate=0.0, patience=2, epochs=9, keep=keep)
    report = train_adapter(make_task(), tmp_path / "a", run)
    assert (report.stopped, report.steps, report.planned_steps) == ("patience", 15, 45)
    assert report.best_step == {"best": 5, "last": 15}[keep]


def test_rows_are_held_out_where_none_are_given(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(evals=False)
    report = train_adapter(task, tmp_path / "a", settings(eval_share=0.25))
    assert (report.rows, report.eval_rows) == (30, 10)
    assert report.notes == ("no rows to score were given: 10 of 40 training rows are held out",)
    report = train_adapter(
        make_task(evals=False), tmp_path / "b", settings(eval_share=0.0, epochs=1)
    )
    assert (report.rows, report.eval_rows, report.best_step) == (40, 0, 5)
    assert report.before == report.best == {}
    assert Bundle.load(tmp_path / "b").layers


def test_an_existing_adapter_is_trained_further(make_task: MakeTask, tmp_path: Path) -> None:
    train_adapter(make_task(), tmp_path / "a", settings(epochs=4))
    bundle = Bundle.load(tmp_path / "a")
    plain = {k: v for k, v in FAST.items() if k not in ("n_frequency", "scaling")}
    further = TrainSettings(**plain, device="cpu")  # type: ignore[arg-type]
    task = make_task()
    expected = accuracy(attach(make_task().model, bundle), task.eval, task)
    report = train_adapter(task, tmp_path / "b", further, bundle=bundle)
    assert report.before["accuracy"] == pytest.approx(expected)
    assert report.adapter["scaling"] == 20.0
    assert Bundle.load(tmp_path / "b").sha256 != bundle.sha256
    with pytest.raises(UsageError, match="n_frequency, scaling"):
        train_adapter(make_task(), tmp_path / "c", settings(), bundle=bundle)
    other = make_task()
    nn.init.normal_(other.model.down.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(BaseMismatchError):
        train_adapter(other, tmp_path / "c", further, bundle=bundle)
    assert not list(tmp_path.glob("c*"))


def test_defaults_need_nothing_but_rows(make_task: MakeTask, tmp_path: Path) -> None:
    report = train_adapter(make_task(), tmp_path / "a")
    assert report.settings["epochs"] and report.settings["batch_size"]
    assert report.adapter["n_frequency"] == 12 * 20 // 4
    assert report.best["loss"] < report.before["loss"]


# --- what goes wrong


def test_a_loss_that_is_not_finite(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    calls = 0

    def breaks(model: nn.Module, batch: Any) -> StepResult:
        nonlocal calls
        calls += torch.is_grad_enabled()
        found = task.step(model, batch)
        return replace(found, loss=found.loss * float("nan")) if calls == 8 else found

    with pytest.raises(UsageError, match=r"step 8: .*a loss of nan; .*--learning-rate"):
        train_adapter(replace(task, step=breaks), tmp_path / "a", settings())
    whole = make_task()
    train_adapter(whole, tmp_path / "b", settings(keep="last"), metrics=tmp_path / "m.json")
    kept = Bundle.load(tmp_path / "a")
    attach(make_task().model, kept)
    # What is left is the adapter of the first evaluation, and a run can go on from there.
    report = train_adapter(make_task(), tmp_path / "a", settings(), resume=True)
    assert report.steps == 15


def test_outputs_are_looked_at_first(make_task: MakeTask, tmp_path: Path) -> None:
    train_adapter(make_task(), tmp_path / "a", settings(epochs=1))
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        train_adapter(make_task(), tmp_path / "a", settings(epochs=1))
    with pytest.raises(UsageError, match="expected one of them, found both"):
        train_adapter(make_task(), tmp_path / "a", settings(), force=True, resume=True)
    report = train_adapter(make_task(), tmp_path / "a", settings(epochs=1, seed=3), force=True)
    assert report.steps == 5
    after = (tmp_path / "a").read_bytes()
    assert after != before
    assert not list(tmp_path.glob("*partial*"))
    # A run that cannot begin leaves what it would have replaced.
    for wrong in ({"metric": "acuracy"}, {"n_frequency": 10**6}):
        with pytest.raises(UsageError):
            train_adapter(make_task(), tmp_path / "a", settings(**wrong), force=True)
        assert (tmp_path / "a").read_bytes() == after
        assert (tmp_path / "a.train/state.safetensors").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "e.train").write_text("notes")
    for out, metrics, found in (
        ("d", None, "a folder"),
        ("f", "d", "a folder"),
        ("e", None, "a file"),
    ):
        with pytest.raises(FileAccessError, match=f"found {found}"):
            place = tmp_path / metrics if metrics else None
            train_adapter(make_task(), tmp_path / out, settings(), metrics=place, force=True)
    with pytest.raises(UsageError, match="expected an output apart from the inputs"):
        train_adapter(make_task(), tmp_path / "c", settings(), metrics=tmp_path / "c")


def test_no_rows(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training rows: expected at least one"):
        train_adapter(replace(make_task(), train=[]), tmp_path / "a")


# --- what is left alone


def test_the_base_and_the_global_generator_stay(make_task: MakeTask, tmp_path: Path) -> None:
    """Statistics of a frozen BatchNorm too: a bundle does not hold them."""
    task = make_task(norm=True, dropout=0.2)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    train_adapter(task, tmp_path / "a", settings())
    assert (torch.get_rng_state() == state).all()
    after = {path: original(m) for path, m in walk(task.model)}
    for name, value in before.items():
        path, _, leaf = name.rpartition(".")
        assert (getattr(after[path], leaf) == value).all(), name


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from fourierft_export.adapt.modules import base_modules

    return list(base_modules(model))


def test_the_bases_dropout_is_off_unless_asked_for(make_task: MakeTask, tmp_path: Path) -> None:
    def losses(name: str, probability: float, **changes: Any) -> list[float]:
        run = settings(steps=3, epochs=None, **changes)
        return train_adapter(make_task(dropout=probability), tmp_path / name, run).history.losses

    plain = losses("a", 0.0)
    assert losses("b", 0.5) == plain
    assert losses("c", 0.5, dropout=True) != plain


def test_dropout_is_a_matter_of_the_seed(make_task: MakeTask, tmp_path: Path) -> None:
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        run = settings(seed=seed, steps=3, epochs=None, dropout=True)
        report = train_adapter(make_task(dropout=0.5), tmp_path / str(number), run)
        losses.append(report.history.losses)
    assert losses[0] == losses[1] != losses[2]


# --- precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype: str, make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    report = train_adapter(task, tmp_path / "a", settings(dtype=dtype, epochs=6))
    exact = train_adapter(make_task(), tmp_path / "b", settings(epochs=6))
    assert report.history.losses != exact.history.losses
    if dtype == "bfloat16":
        assert report.history.losses == pytest.approx(exact.history.losses, rel=0.05, abs=0.02)
    else:  # its first steps only find a scale at which gradients are finite
        assert report.history.losses[0] == pytest.approx(exact.history.losses[0], rel=0.01)
        assert report.history.losses[-1] < 0.7 * report.history.losses[0]
    for layer in fourier_layers(task.model).values():
        assert layer.adapter("default").spectrum.dtype == torch.float32
        assert layer.linear.weight.dtype == getattr(torch, dtype)
    # The bundle is bound to the float32 base that the task brought.
    bundle = Bundle.load(tmp_path / "a")
    assert {layer.fingerprint.dtype for layer in bundle.layers if layer.fingerprint} == {"F32"}
    attach(make_task().model, bundle)


def test_casting_once_is_what_autocast_does_each_time(make_task: MakeTask) -> None:
    x = torch.randn(3, 4, 12)
    config = FourierFTConfig(n_frequency=9, target_modules=["down"], modules_to_save=["head"])
    model = inject(make_task().model, config)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(x)
        assert precision.cast_frozen_linears(model, torch.bfloat16) == 3
        found = model(x)
    assert torch.equal(found, expected)
    assert model.down.linear.weight.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32  # the adapter's version of it, which learns


def test_weights_that_others_use_are_not_cast() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    inject(model, FourierFTConfig(n_frequency=3, target_modules=["1"]))
    assert precision.cast_frozen_linears(model, torch.bfloat16) == 1
    assert model[0].weight.dtype == torch.float32


def test_gradient_checkpointing(stories260k: Path, make_task: MakeTask, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = [
        torch.randint(3, 500, (16,), generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]

    def step(model: nn.Module, batch: Any) -> StepResult:
        logits = model(input_ids=batch["ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = batch["ids"][:, 1:].flatten()
        return StepResult(F.cross_entropy(logits, labels, reduction="sum"), len(labels), {})

    def task() -> TrainingTask:
        model = AutoModelForCausalLM.from_pretrained(stories260k)
        return TrainingTask(
            model, rows * 2, rows, lambda r: {"ids": torch.stack(list(r))}, step, lambda s: {}
        )

    run = TrainSettings(batch_size=2, steps=3, device="cpu")
    plain = train_adapter(task(), tmp_path / "a", run)
    saving = train_adapter(task(), tmp_path / "b", replace(run, gradient_checkpointing=True))
    assert saving.history.losses == pytest.approx(plain.history.losses, rel=1e-6)
    assert plain.history.losses[-1] != plain.history.losses[0]
    with pytest.raises(UsageError, match="Tagger"):
        train_adapter(make_task(), tmp_path / "c", settings(gradient_checkpointing=True))
